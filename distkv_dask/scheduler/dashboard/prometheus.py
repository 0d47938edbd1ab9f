"""Prometheus metrics of all engines of a scheduler, on its ``/metrics``.

Names and units follow OpenMetrics. The number of series is bounded by the number of workers; nothing is labelled by
request or engine. Counters include engines that were closed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector as CollectorBase

from distkv_dask.scheduler.dashboard.view import STATES, states_of
from distkv_dask.scheduler.engines.status import tiers_of

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

    from distkv_dask.scheduler.dashboard.board import Board
    from distkv_dask.scheduler.engines.figures import Latency

COUNTERS = {
    "prefilled_tokens": ("distkv_prompt_tokens", "Prompt tokens whose KV was computed", ""),
    "generated_tokens": ("distkv_generated_tokens", "Tokens sent to clients", ""),
    "windows": ("distkv_windows", "Decode windows", ""),
    "decode_steps": ("distkv_decode_steps", "Decode steps", ""),
    "decode_seconds": ("distkv_decode_seconds", "Time that homes spent in decode windows", "seconds"),
    "sending_seconds": ("distkv_sending_seconds", "Part of it that they spent sending queries", "seconds"),
    "waiting_seconds": ("distkv_waiting_seconds", "Part of it that they waited for partials", "seconds"),
    "gap_seconds": ("distkv_gap_seconds", "Time between decode windows", "seconds"),
    "proposed_tokens": ("distkv_proposed_tokens", "Tokens that were proposed to decode steps", ""),
    "accepted_tokens": ("distkv_accepted_tokens", "Proposed tokens that were accepted", ""),
}
"""Total of an engine -> metric, help text and unit."""

LATENCIES = {
    "queue": ("distkv_queue_seconds", "Time that requests waited for room"),
    "first_token": ("distkv_first_token_seconds", "Time from submission to the first token"),
    "per_token": ("distkv_token_seconds", "Time of each further token, averaged over a request"),
}


class Collector(CollectorBase):
    """Reads the board at every scrape.

    Parameters
    ----------
    board
        Gives access to the engines.
    """

    def __init__(self, board: Board) -> None:
        self._board = board

    def describe(self) -> Iterable[Metric]:
        """Nothing: two schedulers in one process would register the same names."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """The current values of all metrics."""
        engines = list(self._board.engines.values())
        yield GaugeMetricFamily("distkv_engines", "Engines that are open", value=len(engines))
        yield from self._pools()
        states = sum((states_of(engine.life) for engine in engines), Counter[str]())
        requests = GaugeMetricFamily("distkv_requests", "Requests under way", labels=["state"])
        for state in STATES:
            requests.add_metric([state], states[state])
        yield requests
        figures = [self._board.past, *(engine.figures for engine in engines)]
        ended = CounterMetricFamily("distkv_requests_finished", "Requests that ended", labels=["reason"])
        for reason in ("stop", "length", "cancelled", "error"):
            ended.add_metric([reason], sum(one.finished[reason] for one in figures))
        yield ended
        for total, (name, text, unit) in COUNTERS.items():
            yield CounterMetricFamily(name, text, value=sum(one.totals[total] for one in figures), unit=unit)
        sent = CounterMetricFamily(
            "distkv_channel_bytes", "Queries and partials sent over channels", labels=["direction"], unit="bytes"
        )
        for direction in ("to_holders", "to_homes"):
            sent.add_metric([direction], sum(one.totals[f"bytes_{direction}"] for one in figures))
        yield sent
        reused = CounterMetricFamily("distkv_reused_tokens", "Prompt tokens of earlier requests' KV", labels=["tier"])
        copied = CounterMetricFamily("distkv_copied_blocks", "Blocks copied to a lower tier", labels=["tier"])
        for tier in ("memory", "workers", "disk"):
            reused.add_metric([tier], sum(one.totals[f"reused_{tier}_tokens"] for one in figures))
            if tier != "memory":
                copied.add_metric([tier], sum(one.totals[f"copied_{tier}_blocks"] for one in figures))
        yield reused
        yield copied
        events = CounterMetricFamily("distkv_events", "Moves, recalls, repairs, refusals and others", labels=["kind"])
        kinds = sorted({name for one in figures for name in one.totals if name.endswith("_events")})
        for kind in kinds:
            events.add_metric([kind.removesuffix("_events")], sum(one.totals[kind] for one in figures))
        yield events
        for latency, (name, text) in LATENCIES.items():
            yield _histogram(name, text, [getattr(one, latency) for one in figures])

    def _pools(self) -> Iterator[Metric]:
        blocks = GaugeMetricFamily("distkv_blocks", "Blocks of a worker's pools", labels=["worker", "state"])
        memory = GaugeMetricFamily("distkv_kv_bytes", "KV memory of a worker", labels=["worker", "state"], unit="bytes")
        disk = GaugeMetricFamily("distkv_disk_bytes", "KV on a worker's disk", labels=["worker"], unit="bytes")
        host = GaugeMetricFamily("distkv_host_bytes", "KV from a worker's card in its host memory", labels=["worker"])
        kept = GaugeMetricFamily("distkv_kept_blocks", "Blocks of finished requests", labels=["worker", "tier"])
        on_disk, in_memory = Counter[str](), Counter[str]()
        tiers: Counter[tuple[str, str]] = Counter()
        counts: Counter[tuple[str, str]] = Counter()
        sizes: Counter[tuple[str, str]] = Counter()
        for engine in self._board.engines.values():
            for worker, account in engine.life.ledger.workers.items():
                on_disk[worker] += engine.life.disks.disk.used[worker]
                in_memory[worker] += engine.life.disks.memory.used[worker]
                for tier, number in tiers_of(engine.life, worker).items():
                    tiers[worker, tier] += number
                for state, number in account.parts().items():
                    counts[worker, state] += number
                    sizes[worker, state] += number * engine.life.block_bytes
        for key, number in counts.items():
            blocks.add_metric(list(key), number)
            memory.add_metric(list(key), sizes[key])
        for worker, size in on_disk.items():
            disk.add_metric([worker], size)
            host.add_metric([worker], in_memory[worker])
        for key, number in tiers.items():
            kept.add_metric(list(key), number)
        yield kept
        yield blocks
        yield memory
        yield disk
        yield host


def _histogram(name: str, text: str, parts: list[Latency]) -> HistogramMetricFamily:
    counts = [sum(column) for column in zip(*(part.counts for part in parts), strict=True)]
    buckets, below = [], 0
    for bound, count in zip([*map(str, map(float, parts[0].bounds)), "+Inf"], counts, strict=True):
        below += count
        buckets.append((bound, float(below)))
    return HistogramMetricFamily(name, text, buckets=buckets, sum_value=sum(part.sum for part in parts), unit="seconds")
