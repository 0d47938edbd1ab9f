"""How much do moves of live blocks slow down decoding?

One sequence decodes at its home while some of its blocks move back and forth between two other workers, at 0, 16 and 32
tokens per decode step. Engines for all three rates are open on the same cluster and take turns.
"""

from __future__ import annotations

import statistics
from typing import Any

from _report import parser, report
from distributed import Client, LocalCluster

from distkv_dask import Engine, SamplingParams

BLOCK = 64


def shuttle(dask_scheduler: Any, engine: int, moving: bool) -> None:
    """Have an engine's policy propose to move remote blocks to the other holder; runs on the scheduler."""
    from distkv_dask.placement import Move

    life = list(dask_scheduler.plugins["distkv"].engines.values())[engine].life

    class Shuttle(type(life.policy)):  # type: ignore[misc]
        def moves(self, ledger: Any, waiting: Any) -> list[Move]:
            found = []
            for number, account in ledger.sequences.items():
                for span in account.placement[:-1]:
                    others = [name for name in sorted(ledger.workers) if name not in (span.worker, account.home)]
                    found += [Move(number, span.start, span.stop, span.worker, other) for other in others]
            return found

    if moving:
        life.queue.policy = Shuttle(life.policy.model)


def decode(engine: Engine, prompt: int, new: int) -> tuple[float, int]:
    """Milliseconds of a decode step, and the number of blocks that moved during the decode."""
    before = engine.status().totals
    engine.submit([1] * prompt, SamplingParams(max_new_tokens=new, ignore_eos=True)).result()
    after = engine.status().totals
    gained = {name: after[name] - before.get(name, 0) for name in after}
    return gained["decode_seconds"] / gained["decode_steps"] * 1e3, int(gained["moved_blocks"])


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--prompt", type=int, default=2048)
    arguments.add_argument("--new", type=int, default=96, help="decode steps of one turn")
    arguments.add_argument("--repeat", type=int, default=5, help="turns")
    options = arguments.parse_args()
    rates = (0, 16, 32)
    memory = (options.prompt + options.new) // BLOCK // 4 * 3 * BLOCK * 23_040  # three quarters of the context
    turns: list[list[tuple[float, int]]] = []
    with (
        LocalCluster(n_workers=3, threads_per_worker=1, dashboard_address=None) as cluster,
        Client(cluster) as client,
    ):
        engines = [
            Engine(
                client,
                "smollm2-135m",
                kv_memory=memory,
                prefix_cache=False,
                window_steps=4,
                move_tokens_per_step=rate or 1,
            )
            for rate in rates
        ]
        for at, rate in enumerate(rates):
            client.run_on_scheduler(shuttle, engine=at, moving=rate > 0)
        for engine in engines:
            decode(engine, options.prompt, 8)  # warm-up
        turns = [[decode(engine, options.prompt, options.new) for engine in engines] for _ in range(options.repeat)]
        for engine in engines:
            engine.close()
    step = [statistics.median(turn[at][0] for turn in turns) for at in range(len(rates))]
    figures: dict[str, Any] = {"still_step_ms": step[0]}
    for at, rate in list(enumerate(rates))[1:]:
        figures[f"step_ms_{rate}"] = step[at]
        figures[f"loss_{rate}"] = statistics.median(1 - turn[0][0] / turn[at][0] for turn in turns)
        figures[f"moved_tokens_per_step_{rate}"] = (
            statistics.median(turn[at][1] for turn in turns) * BLOCK / (options.new - 1)
        )
    configuration = {"prompt": options.prompt, "new": options.new, "repeat": options.repeat, "block_tokens": BLOCK}
    report(figures, configuration, options.json)


if __name__ == "__main__":
    main()
