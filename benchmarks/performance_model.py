"""How well does the performance model, fitted when an engine opens, predict measured decode steps on this machine?

Two workers are homes of the same number of sequences, because workers were timed at the same time: the model describes
a busy cluster. Batches, contexts and the share of KV at the other worker vary. A step is predicted before the case
begins, including the attention that a worker of one thread computes for the other one's sequences during a step, and
compared with the measured steps of the engine's windows. ``windows`` are the errors of single windows, predicted from
the windows before them, as policies do. ``noise`` is how much consecutive windows of a home differ beyond what the
model expects, which no model can predict.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import asdict, replace
from typing import Any, ClassVar

from _report import parser, report
from distributed import Client, LocalCluster

from distkv_dask import Engine, SamplingParams
from distkv_dask.gang import WindowResult
from distkv_dask.placement import Placement, Span
from distkv_dask.scheduler.costs.calibration import Calibration
from distkv_dask.scheduler.ledger.ledger import Ledger
from distkv_dask.scheduler.policies.base import Ask, Policy

BLOCK = 64
NEW = 64
WARM = 32
"""Steps before each case, from which the model learns the current speed of the machine."""
LOCAL = ((1, 256), (1, 2048), (1, 6144), (4, 512), (4, 1536), (8, 256), (8, 768))
HALVED = ((1, 2048), (1, 6144), (4, 1536), (8, 768))
CASES = [
    *((batch, context, 0.0) for batch, context in LOCAL),
    *((batch, context, 0.5) for batch, context in HALVED),
    (1, 6144, 0.25),
    (1, 6144, 0.75),
]
"""Sequences of each home, tokens of a sequence, and the share of them at the other worker."""


class Fixed(Policy):
    """Alternating homes, and a share of every sequence at the other worker."""

    name: ClassVar[str] = "fixed"
    share: ClassVar[float] = 0.0

    def place(self, ledger: Ledger, ask: Ask, ahead: Ask | None = None) -> Placement | None:
        home, holder = sorted(ledger.workers, reverse=ask.sequence % 2 == 1)
        away = int(ask.prompt * self.share) // BLOCK * BLOCK
        return (*([Span(holder, 0, away)] if away else []), Span(home, away, ask.tokens))


def measure(engine: Engine, batch: int, context: int) -> tuple[float, float]:
    """Seconds of a decode step, and the number of steps of both homes."""
    before = engine.status().totals
    sampling = SamplingParams(max_new_tokens=NEW, ignore_eos=True)
    engine.generate([[1] * context] * 2 * batch, sampling)
    after = engine.status().totals
    steps = after["decode_steps"] - before.get("decode_steps", 0)
    seconds = after["decode_seconds"] - before.get("decode_seconds", 0.0)
    return seconds / steps, steps


def watch(calibration: Calibration) -> tuple[list[float], list[float]]:
    """Record the errors of all later windows, each predicted from those before it, and their noise."""
    errors: list[float] = []
    noise: list[float] = []
    last: dict[str, float] = {}
    observe = calibration.observe

    def compare(home: str, result: WindowResult) -> None:
        if expected := calibration.expected(home, result):
            ratio = expected / (result.seconds / result.steps)
            errors.append(calibration.slower(home) * ratio - 1)
            noise.append(last.get(home, ratio) / ratio - 1)
            last[home] = ratio
        observe(home, result)

    calibration.observe = compare  # type: ignore[method-assign]
    return errors, noise


def cases(options: Any, life: Any, engine: Engine) -> Iterable[dict[str, Any]]:
    home, holder = sorted(life.ledger.workers)
    life.queue.policy = Fixed(life.policy.model)
    for batch, context, share in CASES:
        if context > options.longest:
            continue
        Fixed.share = share
        engine.generate([[1] * 64] * 2, SamplingParams(max_new_tokens=WARM, ignore_eos=True))
        model = replace(life.policy.model, curves=dict(life.policy.model.curves))  # as it is before the case
        measured, steps = measure(engine, batch, context)
        mean = 2 * batch * (NEW - 1) / steps  # average number of sequences that decode together
        length = context + NEW / 2
        away = int(context * share) // BLOCK * BLOCK
        remote = {holder: (batch, mean * away)} if away else {}
        curve = model.of(home)
        guests = mean * away * curve.token
        fitted = model.step(home, mean, mean * (length - away), remote) + guests
        yield {
            "batch": batch, "context": context, "share_away": share, "mean_batch": mean,
            "measured_ms": measured * 1e3, "predicted_ms": fitted * 1e3, "error": fitted / measured - 1,
        }  # fmt: skip


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--longest", type=int, default=6144, help="leave out longer contexts")
    options = arguments.parse_args()
    memory = 8 * (768 + NEW + 2 * BLOCK) * 23_040
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
        Client(cluster) as client,
        Engine(
            client,
            "smollm2-135m",
            kv_memory=max(memory, (6144 + 512) * 23_040),
            performance="measure",
            prefix_cache=False,
        ) as engine,
    ):
        (state,) = cluster.scheduler.plugins["distkv"].engines.values()
        curves = {worker: one.performance for worker, one in engine.status().workers.items()}
        exchange = engine.status().exchange_seconds
        windows, noise = watch(state.life.calibration)
        rows = []
        for row in cases(options, state.life, engine):
            rows.append(row)
            print({name: round(value, 3) for name, value in row.items()}, flush=True)
    errors = [abs(row["error"]) for row in rows]
    figures = {
        "curves": [asdict(one) for one in curves.values()], "exchange_ms": exchange * 1e3, "cases": rows,
        "error_median": statistics.median(errors), "error_worst": max(errors),
        "within_15_percent": sum(error <= 0.15 for error in errors) / len(errors),
        "windows": len(windows), "windows_error_median": statistics.median(map(abs, windows)),
        "windows_error_mean": statistics.fmean(windows), "noise_median": statistics.median(map(abs, noise)),
        "windows_within_15_percent": sum(abs(error) <= 0.15 for error in windows) / len(windows),
    }  # fmt: skip
    report(figures, {"new": NEW, "block_tokens": BLOCK}, options.json)


if __name__ == "__main__":
    main()
