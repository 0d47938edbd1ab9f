"""What do many choice columns on one document cost beside one, and several answers to a prompt beside one?

The document is Python's own language reference, the model SmolLM2-135M. A column is a question whose answer is one of
four choices of one to three tokens; its time includes reading the document, which is ingested anew each time. Answers
are drawn at temperature 1 for a prompt that nothing is known of. The sizes take turns, and figures are medians over
turns. KV is what the pools hold at most while answers are decoded, in blocks.
"""

from __future__ import annotations

import statistics
import threading
import time
from pydoc_data.topics import topics

from _report import parser, report
from distributed import Client, LocalCluster

from distkv_dask import Engine, SamplingParams

CHOICES = ("yes", "no", "not mentioned", "only in part")


def columns(engine: Engine, document: list[int], count: int) -> float:
    """Seconds for a document with so many columns."""
    questions = [engine.tokenizer.encode_more(f"\n\nIs statement {at} about syntax? Answer: ") for at in range(count)]
    began = time.perf_counter()
    with engine.ingest(document) as handle:
        done = handle.ask(questions, SamplingParams(choices=CHOICES))
        seconds = time.perf_counter() - began
    assert all(one.scores for one in done)
    return seconds


def answers(engine: Engine, prompt: list[int], count: int, new: int) -> tuple[float, int]:
    """Seconds for so many answers to a prompt, and blocks that were used at most."""
    sampling = SamplingParams(max_new_tokens=new, ignore_eos=True, temperature=1.0, seed=1, n=count)
    used, over = [0], threading.Event()

    def watch() -> None:
        while not over.wait(0.2):
            used.append(sum(one.used_blocks for one in engine.status().workers.values()))

    watching = threading.Thread(target=watch)
    watching.start()
    began = time.perf_counter()
    done = engine.submit(prompt, sampling).result()
    seconds = time.perf_counter() - began
    over.set()
    watching.join()
    assert len(done.answers) == count
    return seconds, max(used)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--tokens", type=int, default=6000, help="of the document")
    arguments.add_argument("--columns", type=int, default=30)
    arguments.add_argument("--answers", type=int, default=8)
    arguments.add_argument("--new", type=int, default=64, help="tokens of an answer")
    arguments.add_argument("--turns", type=int, default=3)
    arguments.add_argument("--workers", type=int, default=1)
    arguments.add_argument("--threads", type=int, default=2, help="of each worker")
    options = arguments.parse_args()
    figures: dict[str, float] = {}
    with (
        LocalCluster(n_workers=options.workers, threads_per_worker=options.threads, dashboard_address=None) as cluster,
        Client(cluster) as client,
        Engine(client, "smollm2-135m", kv_memory="1 GiB", prefix_cache=False) as engine,
    ):
        text = engine.tokenizer.encode("\n".join(topics[name] for name in sorted(topics)))
        step = options.tokens
        one, many, first, every = ([] for _ in range(4))
        for turn in range(options.turns):
            part = text[turn * step : (turn + 1) * step]
            one.append(columns(engine, part, 1))
            many.append(columns(engine, part, options.columns))
            first.append(answers(engine, part, 1, options.new))
            every.append(answers(engine, part, options.answers, options.new))
    figures["one_column_seconds"] = statistics.median(one)
    figures["columns_ratio"] = statistics.median(b / a for a, b in zip(one, many, strict=True))
    figures["one_answer_seconds"] = statistics.median(seconds for seconds, _ in first)
    figures["answers_ratio"] = statistics.median(b / a for (a, _), (b, _) in zip(first, every, strict=True))
    figures["answers_kv_ratio"] = statistics.median(b / a for (_, a), (_, b) in zip(first, every, strict=True))
    names = ("tokens", "columns", "answers", "new", "turns", "workers", "threads")
    report(figures, {name: getattr(options, name) for name in names}, options.json)


if __name__ == "__main__":
    main()
