"""How full are decode steps and prefill forwards, and how long do batches and first tokens take as a result?

Four loads on SmolLM2-135M in bfloat16: (a) eight long documents; (b) 64 short prompts; (c) a long prompt just before
16 short ones, whose answers are streamed; (d) 32 prompts that share their first 1,000 tokens, and one of them alone.
The engine records a trace, from which steps and forwards are counted.
The peer is plain transformers in the same run, with as many threads as the workers have together: ``generate`` of a
padded batch; for (c) the long prompt and then a batch of the short ones, which cannot join it.
"""

from __future__ import annotations

import statistics
import tempfile
import threading
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
import transformers
from _report import parser, report
from _trace import Lanes, read_trace
from distributed import Client, LocalCluster

from distkv_dask import Engine, SamplingParams
from distkv_dask.models.gguf_cache import converted_weights
from distkv_dask.models.source import resolve_model

Prompts = list[list[int]]


def loads(ids: Sequence[int], options: Namespace) -> dict[str, Prompts]:
    """Prompts of each load, cut from a text; only those of (d) begin alike."""
    whole = iter(range(0, len(ids), 16))

    def cut(tokens: int) -> list[int]:
        first = next(whole)
        for _ in range(tokens // 16):
            next(whole)
        return [*ids[first : first + tokens]]

    short = [20 + at * 7 % 60 for at in range(options.short)]
    return {
        "documents": [cut(options.tokens) for _ in range(options.documents)],
        "short": [cut(tokens) for tokens in short],
        "beside": [cut(options.tokens), *(cut(tokens) for tokens in short[: options.beside])],
        "alike": [one + cut(20) for one in [cut(options.common)] * options.alike],
    }


def together(engine: Engine, prompts: Prompts, sampling: SamplingParams) -> dict[str, float]:
    """Time a batch that arrives at once."""
    began = time.perf_counter()
    done = engine.generate(prompts, sampling)
    seconds = time.perf_counter() - began
    assert all(len(one.token_ids) == sampling.max_new_tokens for one in done)
    return {"seconds": seconds}


def beside(engine: Engine, prompts: Prompts, sampling: SamplingParams) -> dict[str, float]:
    """Time a long prompt and streamed short ones after it: seconds to their first tokens and to the end of all."""
    firsts: list[float] = []

    def read(prompt: list[int]) -> None:
        asked = time.perf_counter()
        stream = iter(engine.stream(prompt, sampling))
        next(stream)
        firsts.append(time.perf_counter() - asked)
        for _ in stream:
            pass

    began = time.perf_counter()
    long = engine.submit(prompts[0], sampling)
    time.sleep(0.2)
    readers = [threading.Thread(target=read, args=[prompt]) for prompt in prompts[1:]]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    short = time.perf_counter() - began
    long.result()
    return {
        "seconds": time.perf_counter() - began,
        "short_first_median": statistics.median(firsts),
        "short_first_worst": max(firsts),
        "short_all_done": short,
        "long_first": long.result().timings.queued + long.result().timings.prefill,
    }


def batches(lanes: Lanes) -> dict[str, float]:
    """Numbers of decode steps and prefill forwards in the home lanes, and their mean numbers of rows."""
    homes = [one for (_, lane), spans in lanes.items() if lane == "home lane" for one in spans]
    steps = [one.size for one in homes if one.name == "step"]
    chunks = [one for one in homes if one.name == "chunk"]
    return {
        "decode_steps": len(steps),
        "rows_per_step": statistics.mean(steps),
        "prefill_forwards": len(chunks),
        "tokens_per_forward": statistics.mean(one.size for one in chunks),
    }


def ours(options: Namespace) -> dict[str, dict[str, float]]:
    """Figures of each load on its own engine, traced."""
    found: dict[str, dict[str, float]] = {}
    sampling = SamplingParams(max_new_tokens=options.new, ignore_eos=True)
    with (
        tempfile.TemporaryDirectory() as folder,
        LocalCluster(n_workers=options.workers, threads_per_worker=options.threads, dashboard_address=None) as cluster,
        Client(cluster) as client,
    ):
        for name in options.only:
            file = Path(folder) / f"{name}.json"
            settings: dict[str, Any] = {"dtype": "bfloat16", "kv_memory": options.kv_memory}
            settings["prefix_cache"] = name == "alike" and not options.without_cache
            with Engine(client, "smollm2-135m", trace=str(file), **settings) as engine:
                prompts = loads(engine.tokenizer.encode(text()), options)[name]
                one = together(engine, [prompts[0][::-1]], sampling) if name == "alike" else {}
                found[name] = (beside if name == "beside" else together)(engine, prompts, sampling)
                found[name] |= {f"one_{key}": value for key, value in one.items()}
            if name != "alike":  # the trace of "alike" also contains the single prompt
                found[name] |= batches(read_trace(file))
    return found


def text() -> str:
    """Python's own language reference."""
    return "\n".join(topics[name] for name in sorted(topics))


def peer(options: Namespace) -> dict[str, dict[str, float]]:
    """Seconds of plain transformers for the same loads."""
    torch.set_num_threads(options.workers * options.threads)
    source = resolve_model("smollm2-135m")
    folder = converted_weights(Path(source.location), "bfloat16")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    tokenizer = source.tokenizer()
    assert tokenizer is not None
    prompts = loads(tokenizer.encode(text(), add_special_tokens=False), options)

    def generate(batch: Prompts, new: int) -> float:
        width = max(map(len, batch))
        ids = torch.tensor([[0] * (width - len(one)) + one for one in batch])
        mask = torch.tensor([[0] * (width - len(one)) + [1] * len(one) for one in batch])
        began = time.perf_counter()
        model.generate(ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False)
        return time.perf_counter() - began

    generate(prompts["short"][:1], 2)  # warm-up
    found: dict[str, dict[str, float]] = {}
    for name in options.only:
        if name != "beside":
            found[name] = {"seconds": generate(prompts[name], options.new)}
            continue
        long = generate(prompts[name][:1], options.new)
        first = long + generate(prompts[name][1:], 1)
        found[name] = {"seconds": long + generate(prompts[name][1:], options.new), "short_first_median": first}
    return found


def main() -> None:
    arguments = parser(__doc__)
    loads = ["documents", "short", "beside", "alike"]
    arguments.add_argument("--only", nargs="+", default=loads, choices=loads, metavar="LOAD")
    arguments.add_argument("--documents", type=int, default=8)
    arguments.add_argument("--tokens", type=int, default=6070, help="tokens of a document")
    arguments.add_argument("--short", type=int, default=64, help="number of short prompts")
    arguments.add_argument("--beside", type=int, default=16, help="number of short prompts after the long one")
    arguments.add_argument("--alike", type=int, default=32, help="number of prompts that begin alike")
    arguments.add_argument("--common", type=int, default=1000, help="number of tokens that these share")
    arguments.add_argument("--without-cache", action="store_true", help="compute the shared beginning of each")
    arguments.add_argument("--new", type=int, default=64)
    arguments.add_argument("--workers", type=int, default=2)
    arguments.add_argument("--threads", type=int, default=1, help="threads of a worker")
    arguments.add_argument("--kv-memory", default="700 MiB", help="per worker")
    options = arguments.parse_args()
    found, peers = ours(options), peer(options)
    figures = {
        name: {key: round(value, 3) for key, value in found[name].items()}
        | {f"peer_{key}": round(value, 2) for key, value in peers[name].items()}
        | {"times_faster": round(peers[name]["seconds"] / found[name]["seconds"], 2)}
        for name in options.only
    }
    report(figures, {name: value for name, value in vars(options).items() if name != "json"}, options.json)


if __name__ == "__main__":
    main()
