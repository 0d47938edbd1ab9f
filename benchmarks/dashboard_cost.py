"""What does the dashboard cost the scheduler, with 200 workers and 10,000 sequences?

A gManager's lifecycle is filled with placed sequences, some of them split. Then the work of the dashboard is timed: the
history's sample (every second, also without open pages), a Prometheus scrape (every 15 s), the view of a page (while
any page is open, shared by all pages, as often as the board allows) and updating a page's models from it. There is no
browser, so the cost of sending Bokeh's changes is not included.
"""

from __future__ import annotations

import itertools
import statistics
import time
from array import array
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from _report import parser, report
from prometheus_client import CollectorRegistry, generate_latest

from distkv_dask.completion import Timings
from distkv_dask.config import Config
from distkv_dask.gang import Exchanged, WindowResult
from distkv_dask.messages.client_calls import Generate
from distkv_dask.placement import Endpoint
from distkv_dask.sampling import SamplingParams
from distkv_dask.scheduler.dashboard.board import FRESH, SHARE
from distkv_dask.scheduler.dashboard.page import PANELS
from distkv_dask.scheduler.dashboard.prometheus import Collector
from distkv_dask.scheduler.dashboard.view import states_of, view_of
from distkv_dask.scheduler.engines.figures import Figures
from distkv_dask.scheduler.lifecycle.events import Submit, WorkerReady
from distkv_dask.scheduler.lifecycle.machine import Lifecycle
from distkv_dask.scheduler.records.machine_state import MachineState


def crowd(workers: int, sequences: int) -> tuple[MachineState, Figures]:
    """A lifecycle with this many sequences, placed by the engine's policy; one in 1,000 is larger than a worker."""
    config = Config.load(block_tokens=16, window_batch=100_000)
    life = MachineState("engine", config, itertools.count(1), block_bytes=1024)
    machine = Lifecycle(life)
    blocks = -(-sequences * 36 // workers)
    for at in range(workers):
        endpoint = Endpoint(f"tcp://10.0.{at // 250}.{at % 250}:40000", "127.0.0.1", at)
        machine.handle(WorkerReady(endpoint, blocks), 0.0)
    for number in range(sequences):
        prompt = array("i", [1] * (100_000 if number % 1000 == 999 else 40 + number * 37 % 700))
        machine.handle(Submit((Generate(number, prompt, SamplingParams(max_new_tokens=8)),)), 0.0)
        life.in_prefill.clear()  # so that the next one may begin
    figures = Figures()
    for at in range(1000):
        figures.ended("length", Timings(0.1 * at, 1.0, 2.0), 50)
        figures.happened(float(at), "move", "16 blocks of sequence 3 from a to b")
    for worker in life.ledger.workers:
        figures.window(worker, WindowResult({}, {}, 10, 1.0, Exchanged(0.02, 0.1), 0.01))
    for at in range(600):
        figures.sample(float(at), states_of(life))
    return life, figures


def milliseconds(work: Callable[[], Any], repeat: int) -> float:
    """Median CPU time of a piece of work."""
    times = []
    for _ in range(repeat):
        began = time.process_time()
        work()
        times.append(time.process_time() - began)
    return statistics.median(times) * 1e3


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--workers", type=int, default=200)
    arguments.add_argument("--sequences", type=int, default=10_000)
    arguments.add_argument("--repeat", type=int, default=20)
    options = arguments.parse_args()
    life, figures = crowd(options.workers, options.sequences)
    placed = list(life.ledger.sequences.values())
    look = lambda: view_of(life, figures, "model", str, 1.0)  # noqa: E731
    view, panels = look(), [kind() for kind in PANELS]
    registry = CollectorRegistry()
    engine = SimpleNamespace(life=life, figures=figures)
    registry.register(Collector(SimpleNamespace(engines={"engine": engine}, past=Figures())))
    cost = {
        "sample_ms": milliseconds(lambda: figures.sample(0.0, states_of(life)), options.repeat),
        "view_ms": milliseconds(look, options.repeat),
        "page_ms": milliseconds(lambda: [panel.update(view) for panel in panels], options.repeat),
        "scrape_ms": milliseconds(lambda: generate_latest(registry), options.repeat),
    }
    always = cost["sample_ms"] / 1000 + cost["scrape_ms"] / 15_000
    figures_out = {
        "placed_sequences": len(placed),
        "split_sequences": sum(len(one.placement) > 1 for one in placed),
        **cost,
        "core_share_closed": always,
        "core_share_one_page": always
        + (cost["view_ms"] + cost["page_ms"]) / 1000 / max(FRESH, cost["view_ms"] / 1000 / SHARE),
    }
    report(figures_out, {"workers": options.workers, "sequences": options.sequences}, options.json)


if __name__ == "__main__":
    main()
