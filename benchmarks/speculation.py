"""How much does speculation without a draft model gain if answers quote their document, and what does it cost if not?

Two engines with the same weights are open on one cluster and take turns, with ``distkv.speculation`` at ``auto`` and
``off``. The document is Python's language reference, the model SmolLM2-135M in bfloat16. ``quote`` asks for passages of
the document word for word and gives their first words; ``write`` samples a continuation at temperature 1, which repeats
some phrases of the text; ``strange`` samples at temperature 3, which repeats nothing. Decode tokens per second are the
tokens of all answers of a turn per second in decode windows; figures are medians over turns, and ratios are medians
over pairs of turns.
"""

from __future__ import annotations

import statistics
from pydoc_data.topics import topics
from typing import Any

from _report import parser, report
from distributed import Client, LocalCluster

from distkv_dask import Document, Engine, SamplingParams

MODES = ("off", "auto")
TASKS = {"quote": 0.0, "write": 1.0, "strange": 3.0}
"""Temperatures."""
GIVEN = 24
"""Tokens of a passage with which a question ends."""


def questions(engine: Engine, document: list[int], task: str, batch: int, turn: int) -> list[list[int]]:
    """Questions of a turn: passages from different places each time."""
    ask = engine.tokenizer.encode_more("\n\nThe same passage once more, word for word:\n\n")
    step = (len(document) - 600) // (batch + 1)
    starts = [step * at + 37 * turn for at in range(1, batch + 1)]
    if task == "quote":
        return [[*ask, *document[start : start + GIVEN]] for start in starts]
    return [engine.tokenizer.encode_more(f"\n\nNote {start}. ") for start in starts]


def run(engine: Engine, handle: Document, asked: list[list[int]], sampling: SamplingParams) -> dict[str, Any]:
    """Answer once; returns decode tokens per second, proposed and accepted tokens, and the answers."""
    before = engine.status().totals
    done = handle.ask(asked, sampling)
    after = engine.status().totals
    seconds = after["decode_seconds"] - before.get("decode_seconds", 0.0)
    return {
        "tps": sum(len(one.token_ids) - 1 for one in done) / seconds,
        "proposed": sum(one.timings.proposed_tokens for one in done),
        "accepted": sum(one.timings.accepted_tokens for one in done),
        "tokens": [one.token_ids for one in done],
    }


def measured(engines: dict[str, Engine], options: Any) -> dict[str, Any]:
    """Figures of every task and batch."""
    tokenizer = engines["off"].tokenizer
    document = tokenizer.encode("\n".join(topics[name] for name in sorted(topics)))[: options.tokens]
    handles = {mode: engine.ingest(document) for mode, engine in engines.items()}
    found: dict[str, Any] = {}
    for task, temperature in TASKS.items():
        for batch in options.batch:
            sampling = SamplingParams(max_new_tokens=options.new, temperature=temperature, seed=1, ignore_eos=True)
            turns: dict[str, list[dict[str, Any]]] = {mode: [] for mode in MODES}
            for turn in range(options.turns + 1):  # the first turn is a warm-up
                for mode in MODES if turn % 2 else MODES[::-1]:
                    asked = questions(engines[mode], document, task, batch, turn)
                    turns[mode].append(run(engines[mode], handles[mode], asked, sampling))
            off, on = (turns[mode][1:] for mode in MODES)
            pairs = list(zip(off, on, strict=True))
            name, answers = f"{task}_{batch}", batch * options.turns
            found[f"{name}_tps_off"] = statistics.median(one["tps"] for one in off)
            found[f"{name}_tps_on"] = statistics.median(one["tps"] for one in on)
            found[f"{name}_ratio"] = statistics.median(b["tps"] / a["tps"] for a, b in pairs)
            found[f"{name}_proposed_per_answer"] = sum(one["proposed"] for one in on) / answers
            found[f"{name}_accepted_per_answer"] = sum(one["accepted"] for one in on) / answers
            found[f"{name}_same_answers"] = sum(a["tokens"] == b["tokens"] for a, b in pairs) / options.turns
    for handle in handles.values():
        handle.release()
    return found


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--tokens", type=int, default=3000, help="tokens of the document")
    arguments.add_argument("--new", type=int, default=128)
    arguments.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="questions in a batch")
    arguments.add_argument("--turns", type=int, default=3)
    arguments.add_argument("--workers", type=int, default=1)
    arguments.add_argument("--threads", type=int, default=2, help="threads of each worker")
    arguments.add_argument("--kv-memory", default="256 MiB", help="per worker and engine")
    options = arguments.parse_args()
    settings = {"dtype": "bfloat16", "kv_memory": options.kv_memory, "prefix_cache": False}
    with (
        LocalCluster(n_workers=options.workers, threads_per_worker=options.threads, dashboard_address=None) as cluster,
        Client(cluster) as client,
        Engine(client, "smollm2-135m", speculation="off", **settings) as off,
        Engine(client, "smollm2-135m", speculation="auto", **settings) as auto,
    ):
        figures = measured({"off": off, "auto": auto}, options)
    names = ("tokens", "new", "batch", "turns", "workers", "threads", "kv_memory")
    report(figures, {name: getattr(options, name) for name in names}, options.json)


if __name__ == "__main__":
    main()
