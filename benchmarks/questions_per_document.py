"""How much faster are sixteen questions on one document of 6,000 tokens than sixteen separate requests?

``seconds_shared`` is the time to ingest the document and answer all questions together; ``seconds_separate`` is that of
the same prompts through ``engine.generate``, extrapolated from ``--separate`` of them. The peer is plain transformers
on as many threads as the workers have together, one question after the other: with a forward over the whole prompt for
each (``peer_separate_seconds``), and with a copy of the document's cache for each (``peer_shared_seconds``); both are
extrapolated from ``--peer`` questions. The model is SmolLM2-135M in bfloat16, and answers are greedy.
"""

from __future__ import annotations

import copy
import time
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
import transformers
from _report import parser, report
from distributed import Client, LocalCluster

from distkv_dask import Engine, SamplingParams
from distkv_dask.models.gguf_cache import converted_weights
from distkv_dask.models.source import resolve_model


def prompts(engine: Engine, tokens: int, count: int) -> tuple[list[int], list[list[int]]]:
    """A document from Python's language reference, and questions on it."""
    ids = engine.tokenizer.encode("\n".join(topics[name] for name in sorted(topics)))
    words = sorted(topics)
    return ids[:tokens], [
        engine.tokenizer.encode_more(f"\n\nQuestion: what does the text say about {words[at]}?\nAnswer:")
        for at in range(count)
    ]


def ours(options: Any) -> tuple[dict[str, float], list[int], list[list[int]]]:
    """Seconds with and without sharing, in one cluster."""
    sampling = SamplingParams(max_new_tokens=options.new, ignore_eos=True)
    with (
        LocalCluster(n_workers=options.workers, threads_per_worker=options.threads, dashboard_address=None) as cluster,
        Client(cluster) as client,
        Engine(client, "smollm2-135m", dtype="bfloat16", kv_memory=options.kv_memory, prefix_cache=False) as engine,
    ):
        document, questions = prompts(engine, options.tokens, options.questions)
        engine.generate([document[:100]] * options.workers, SamplingParams(max_new_tokens=2))  # warm-up
        began = time.perf_counter()
        with engine.ingest(document) as handle:
            ingested = time.perf_counter()
            done = handle.ask(questions, sampling)
        shared = time.perf_counter()
        assert all(len(one.token_ids) == options.new for one in done), done
        separate = engine.generate([document + question for question in questions[: options.separate]], sampling)
        ended = time.perf_counter()
    assert all(len(one.token_ids) == options.new for one in separate), separate
    figures = {
        "seconds_shared": shared - began,
        "seconds_ingest": ingested - began,
        "seconds_separate": (ended - shared) * options.questions / options.separate,
        "reused_tokens": sum(one.reused_tokens for one in done),
        "same_tokens": sum(
            a == b for one, other in zip(done, separate, strict=False)
            for a, b in zip(one.token_ids, other.token_ids, strict=True)
        ) / (options.separate * options.new),
    }  # fmt: skip
    return figures, document, questions


def peer(document: list[int], questions: list[list[int]], options: Any) -> tuple[float, float]:
    """Seconds of plain transformers for all questions: each with its whole prompt, and each with a copied cache."""
    torch.set_num_threads(options.workers * options.threads)
    folder = converted_weights(Path(resolve_model("smollm2-135m").location), "bfloat16")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    whole = torch.tensor([document])

    def generate(question: list[int], cache: Any = None) -> float:
        ids = torch.tensor([document + question])
        began = time.perf_counter()
        model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=options.new, do_sample=False, eos_token_id=None,
            past_key_values=copy.deepcopy(cache),
        )  # fmt: skip
        return time.perf_counter() - began

    scale = options.questions / options.peer
    separate = sum(generate(question) for question in questions[: options.peer]) * scale
    began = time.perf_counter()
    with torch.inference_mode():
        cache = model(whole, use_cache=True, logits_to_keep=1).past_key_values
    ingest = time.perf_counter() - began
    return separate, ingest + sum(generate(question, cache) for question in questions[: options.peer]) * scale


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--questions", type=int, default=16)
    arguments.add_argument("--separate", type=int, default=6, help="number of separate requests measured")
    arguments.add_argument("--peer", type=int, default=1, help="number of questions measured with the peer; 0: no peer")
    arguments.add_argument("--tokens", type=int, default=6000)
    arguments.add_argument("--new", type=int, default=32)
    arguments.add_argument("--workers", type=int, default=1, help="workers; one at a time computes a document")
    arguments.add_argument("--threads", type=int, default=2, help="threads of each worker")
    arguments.add_argument("--kv-memory", default="512 MiB", help="per worker")
    options = arguments.parse_args()
    figures, document, questions = ours(options)
    found: dict[str, Any] = {"questions": options.questions, **figures}
    found["ratio"] = figures["seconds_separate"] / figures["seconds_shared"]
    if options.peer:
        found["peer_separate_seconds"], found["peer_shared_seconds"] = peer(document, questions, options)
        found["times_faster_than_transformers"] = found["peer_separate_seconds"] / figures["seconds_shared"]
        found["times_faster_than_transformers_sharing"] = found["peer_shared_seconds"] / figures["seconds_shared"]
    names = ("questions", "separate", "peer", "tokens", "new", "workers", "threads", "kv_memory")
    report(found, {name: getattr(options, name) for name in names}, options.json)


if __name__ == "__main__":
    main()
