"""What do quotes, choices and several answers cost compared with one free answer, on a document of real text?

The document is Python's language reference, with its KV on all workers; the model is SmolLM2-135M in bfloat16.

``quote``: batches of questions about a stored document, with quotes and with free answers of the same length: seconds
of a batch, and how many quotes are in the document at their offsets. ``choices``: one question with five choices, and
``--columns`` such questions, each time about a new document: seconds from its text to the last answer. ``n``: one
answer to the whole text, and ``--answers`` of them, each time without reused KV: seconds, and the maximum number of KV
blocks in use. Figures are medians over turns, and ratios are medians over pairs of turns.
"""

from __future__ import annotations

import statistics
import threading
import time
from pydoc_data.topics import topics
from typing import Any

from _report import parser, report
from distributed import Client, LocalCluster

from distkv_dask import Completion, Document, Engine, SamplingParams

CHOICES = ("syntax", "names", "types", "errors", "none of these")


def asked(count: int, turn: int) -> list[str]:
    """Questions, which differ in each turn."""
    return [f"{turn}.{number}: which passage is about the letter {chr(97 + number % 26)}?" for number in range(count)]


def answered(document: Document, questions: list[str], sampling: Any) -> tuple[float, list[Completion]]:
    """Seconds of answers that are computed together, and the answers."""
    began = time.perf_counter()
    done: list[Completion] = document.ask(questions, sampling)
    return time.perf_counter() - began, done


def measured_quotes(engine: Engine, text: str, options: Any) -> dict[str, Any]:
    """Quotes and free answers, in turns."""
    free, quoting = [], []
    spans = right = 0
    with engine.ingest(text) as document:
        for turn in range(-(-options.spans // options.batch) + 1):  # the first turn is a warm-up
            took, done = answered(document, asked(options.batch, turn), SamplingParams(options.new, 1.0, quotes=True))
            lengths = [max(1, len(one.token_ids)) for one in done]
            same = [SamplingParams(length, 1.0, ignore_eos=True) for length in lengths]
            beside, _ = answered(document, asked(options.batch, turn), same)
            if turn:
                quoting.append(took)
                free.append(beside)
            spans += len(done)
            quotes = [one.quote for one in done if one.quote is not None]
            right += sum(text[one.start : one.stop] == one.text for one in quotes)
    return {
        "free_seconds": statistics.median(free),
        "quote_seconds": statistics.median(quoting),
        "quote_ratio": statistics.median(quote / one for one, quote in zip(free, quoting, strict=True)),
        "quotes": spans,
        "quotes_at_their_offsets": right,
    }


def measured_choices(engine: Engine, text: str, options: Any) -> dict[str, Any]:
    """One column of choices and several, in turns."""
    sampling = SamplingParams(choices=CHOICES)
    seconds: dict[int, list[float]] = {1: [], options.columns: []}
    for turn in range(options.turns + 1):
        for columns, each in seconds.items():
            began = time.perf_counter()
            with engine.ingest(f"Copy {turn} for {columns}.\n\n{text}") as document:
                done = document.ask(asked(columns, turn), sampling)
            each += [time.perf_counter() - began] if turn else []
            assert all(one.scores is not None and abs(sum(one.scores.values()) - 1) < 1e-3 for one in done), done
    one, many = seconds.values()
    return {
        "choices_seconds_1": statistics.median(one),
        f"choices_seconds_{options.columns}": statistics.median(many),
        "choices_ratio": statistics.median(b / a for a, b in zip(one, many, strict=True)),
    }


class MostBlocks:
    """Maximum number of KV blocks in use inside the ``with`` statement, sampled every 50 ms."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self.most = 0

    def _look(self) -> None:
        while not self._over.wait(0.05):
            workers = self._engine.status().workers.values()
            self.most = max(self.most, sum(worker.used_blocks for worker in workers))

    def __enter__(self) -> MostBlocks:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


def measured_answers(engine: Engine, text: str, options: Any) -> dict[str, Any]:
    """One answer and several, in turns."""
    seconds: dict[int, list[float]] = {1: [], options.answers: []}
    blocks: dict[int, list[int]] = {1: [], options.answers: []}
    for turn in range(options.turns + 1):
        for count in seconds:
            sampling = SamplingParams(options.new, temperature=1.0, seed=turn, ignore_eos=True, n=count)
            began = time.perf_counter()
            with MostBlocks(engine) as used:
                (done,) = engine.generate([f"Copy {turn} for {count}.\n\n{text}"], sampling)
            assert len(done.answers) == count, done
            if turn:
                seconds[count].append(time.perf_counter() - began)
                blocks[count].append(used.most)
    (one, many), (few, more) = seconds.values(), blocks.values()
    return {
        "answers_seconds_1": statistics.median(one),
        f"answers_seconds_{options.answers}": statistics.median(many),
        "answers_ratio": statistics.median(b / a for a, b in zip(one, many, strict=True)),
        "answers_kv_ratio": statistics.median(b / a for a, b in zip(few, more, strict=True)),
    }


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--tokens", type=int, default=6000, help="tokens of the document")
    arguments.add_argument("--new", type=int, default=40, help="tokens of an answer, at most")
    arguments.add_argument("--batch", type=int, default=16, help="quotes in a batch")
    arguments.add_argument("--spans", type=int, default=1000, help="quotes in all")
    arguments.add_argument("--columns", type=int, default=30, help="number of columns with choices")
    arguments.add_argument("--answers", type=int, default=8, help="number of answers to one prompt")
    arguments.add_argument("--turns", type=int, default=3, help="turns of choices and several answers")
    arguments.add_argument("--workers", type=int, default=2)
    arguments.add_argument("--threads", type=int, default=1, help="threads of each worker")
    arguments.add_argument("--kv-memory", default="256 MiB", help="per worker")
    options = arguments.parse_args()
    settings = {"dtype": "bfloat16", "kv_memory": options.kv_memory, "prefix_cache": False}
    with (
        LocalCluster(n_workers=options.workers, threads_per_worker=options.threads, dashboard_address=None) as cluster,
        Client(cluster) as client,
        Engine(client, "smollm2-135m", **settings) as engine,
    ):
        whole = "\n".join(topics[name] for name in sorted(topics))
        text = engine.tokenizer.decode(engine.tokenizer.encode(whole)[: options.tokens])
        figures = measured_choices(engine, text, options) | measured_answers(engine, text, options)
        figures |= measured_quotes(engine, text, options)
    names = ("tokens", "new", "batch", "spans", "columns", "answers", "turns", "workers", "threads", "kv_memory")
    report(figures, {name: getattr(options, name) for name in names}, options.json)


if __name__ == "__main__":
    main()
