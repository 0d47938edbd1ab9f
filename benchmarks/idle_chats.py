"""Chats with pauses between turns, and room for a part of their KV: what do lower tiers of the prefix cache save?

Each turn is a plain request: the chat so far and a few more tokens, sent after the previous answer and a random pause,
which is the same in every mode. KV memory has room for the share ``--room`` of the KV that all chats have at their end.
The modes: ``none`` reuses nothing (``distkv.prefix-cache: false``), ``memory`` has one tier
(``distkv.prefix-cache-tier: memory``), ``tiers`` has all. ``times_none`` and ``times_memory`` are ratios of throughput;
``first_token_ratio`` is that of the median times to the first token with all tiers and without reuse. Weights and KV
are float32 and answers are greedy, so that tokens can be compared.
"""

from __future__ import annotations

import random
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from _report import parser, report
from distributed import Client, LocalCluster

from distkv_dask import Completion, Engine, SamplingParams

MODES: dict[str, dict[str, Any]] = {
    "none": {"prefix_cache": False},
    "memory": {"prefix_cache_tier": "memory"},
    "tiers": {"prefix_cache_tier": "disk"},
}


def chat(engine: Engine, number: int, options: Any) -> list[Completion]:
    """All turns of one chat."""
    draw = random.Random(number)
    sampling = SamplingParams(max_new_tokens=options.new, ignore_eos=True)
    tokens, turns = [draw.randrange(1000, 40000) for _ in range(options.first)], []
    for _ in range(options.turns):
        time.sleep(draw.expovariate(1 / options.think))
        done = engine.submit(tokens, sampling).result()
        turns.append(done)
        tokens = [*tokens, *done.token_ids, *(draw.randrange(1000, 40000) for _ in range(options.more))]
    return turns


def serve(options: Any, mode: str) -> tuple[dict[str, Any], list[list[Completion]]]:
    """Figures of a mode, and the answers by chat."""
    per_chat = options.first + (options.turns - 1) * (options.more + options.new) + options.new
    with (
        LocalCluster(n_workers=options.workers, threads_per_worker=options.threads, dashboard_address=None) as cluster,
        Client(cluster) as client,
    ):
        room = int(options.room * options.chats * per_chat * options.kv_bytes / options.workers)
        with Engine(client, options.model, dtype="float32", kv_memory=room, **MODES[mode]) as engine:
            engine.generate([[1] * 100] * options.workers, SamplingParams(max_new_tokens=2))  # warm-up
            began = time.perf_counter()
            with ThreadPoolExecutor(options.chats) as threads:
                chats = list(threads.map(lambda number: chat(engine, number, options), range(options.chats)))
            seconds = time.perf_counter() - began
            totals = engine.status().totals
    turns = [turn for one in chats for turn in one]
    first = [turn.timings.queued + turn.timings.prefill for turn in turns]
    names = [name for name in totals if name.startswith(("reused_", "copied_", "prefilled_"))]
    figures = {
        "seconds": seconds,
        "tokens_per_second": sum(len(turn.token_ids) for turn in turns) / seconds,
        "first_token": statistics.median(first),
        "first_token_p90": statistics.quantiles(first, n=10)[-1],
    }
    return figures | {name: totals[name] for name in names}, chats


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--model", default="smollm2-135m")
    arguments.add_argument("--kv-bytes", type=int, default=46_080, help="KV bytes of a token of this model in float32")
    arguments.add_argument("--chats", type=int, default=32)
    arguments.add_argument("--turns", type=int, default=8)
    arguments.add_argument("--first", type=int, default=400, help="tokens of the first turn")
    arguments.add_argument("--more", type=int, default=40, help="tokens of each further turn")
    arguments.add_argument("--new", type=int, default=8, help="tokens of each answer")
    arguments.add_argument("--think", type=float, default=2.0, help="seconds between turns, on average")
    arguments.add_argument("--room", type=float, default=0.25, help="KV memory, as a part of the KV of all chats")
    arguments.add_argument("--workers", type=int, default=2)
    arguments.add_argument("--threads", type=int, default=1, help="threads of each worker")
    arguments.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    options = arguments.parse_args()
    found: dict[str, Any] = {}
    answers = {}
    for mode in options.modes:
        found[mode], answers[mode] = serve(options, mode)
    if set(MODES) == set(options.modes):
        found["times_none"] = found["none"]["seconds"] / found["tiers"]["seconds"]
        found["times_memory"] = found["memory"]["seconds"] / found["tiers"]["seconds"]
        found["first_token_ratio"] = found["tiers"]["first_token"] / found["none"]["first_token"]
    tokens = {mode: [turn.token_ids for one in chats for turn in one] for mode, chats in answers.items()}
    found["same_tokens"] = all(some == tokens[options.modes[0]] for some in tokens.values())
    report(found, {name: value for name, value in vars(options).items() if name != "json"}, options.json)


if __name__ == "__main__":
    main()
