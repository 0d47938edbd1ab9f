"""How long do eight documents of about 6,000 tokens, with 64 answer tokens each, take compared with plain transformers?

The documents are pieces of Python's language reference, the model is SmolLM2-135M in bfloat16, and answers are greedy.
The peer answers one document in the same run, with as many threads as the workers have together; the ratio is per
document.
"""

from __future__ import annotations

import time
from dataclasses import astuple
from pathlib import Path
from pydoc_data.topics import topics

import torch
import transformers
from _report import parser, report
from distributed import Client, LocalCluster

from distkv_dask import Engine, SamplingParams
from distkv_dask.models.gguf_cache import converted_weights
from distkv_dask.models.source import resolve_model

TOKENS = 6070


def documents(engine: Engine, count: int) -> list[list[int]]:
    """Pieces of ``TOKENS`` tokens."""
    ids = engine.tokenizer.encode("\n".join(topics[name] for name in sorted(topics)))
    return [ids[number * TOKENS : (number + 1) * TOKENS] for number in range(count)]


def peer_seconds(document: list[int], new: int, threads: int) -> tuple[float, float]:
    """Seconds of plain transformers for one document: to its first token, and for the rest."""
    torch.set_num_threads(threads)
    folder = converted_weights(Path(resolve_model("smollm2-135m").location), "bfloat16")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    ids = torch.tensor([document])

    def generate(tokens: int) -> float:
        began = time.perf_counter()
        model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, eos_token_id=None
        )
        return time.perf_counter() - began

    first = generate(1)
    return first, generate(new) - first


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--documents", type=int, default=8)
    arguments.add_argument("--new", type=int, default=64)
    arguments.add_argument("--workers", type=int, default=2)
    arguments.add_argument("--kv-memory", default="256 MiB", help="per worker")
    options = arguments.parse_args()
    sampling = SamplingParams(max_new_tokens=options.new, ignore_eos=True)
    with (
        LocalCluster(n_workers=options.workers, threads_per_worker=1, dashboard_address=None) as cluster,
        Client(cluster) as client,
        Engine(client, "smollm2-135m", dtype="bfloat16", kv_memory=options.kv_memory, prefix_cache=False) as engine,
    ):
        prompts = documents(engine, options.documents)
        engine.generate([prompts[0][:100]], SamplingParams(max_new_tokens=2))  # warm-up
        began = time.perf_counter()
        done = engine.generate(prompts, sampling)
        seconds = time.perf_counter() - began
    assert all(len(one.token_ids) == options.new for one in done)
    first, rest = peer_seconds(prompts[0], options.new, options.workers)
    per_document = seconds / options.documents
    figures = {
        "seconds": seconds,
        "prompt_tokens": sum(one.prompt_tokens for one in done),
        "tokens_per_second": sum(one.prompt_tokens + options.new for one in done) / seconds,
        "seconds_per_document": per_document,
        "peer_first_token_seconds": first,
        "peer_decode_seconds": rest,
        "times_faster_than_transformers": (first + rest) / per_document,
        "timings": [[round(value, 2) for value in astuple(one.timings)] for one in done],
    }
    configuration = {
        name: getattr(options, name.replace("-", "_")) for name in ("documents", "new", "workers", "kv_memory")
    }
    report(figures, configuration, options.json)


if __name__ == "__main__":
    main()
