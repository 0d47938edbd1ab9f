"""Layers over workers: how fast do stages decode and read a prompt, beside what their layers alone would take?

A Llama with random weights has its layers on several workers with one thread each. The bound of a step is the sum of
the stages' times for their layers alone: the same runs of layers in one process, without attention, channels, Dask or
sampling (``bound``: tokens per second). Bounds are measured before and after the engine's rates, with nothing else
running, and the better one counts. Rates are medians over turns. Nannies enforce ``--memory-limit``, so the benchmark
also shows that a model much larger than a worker opens.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from _report import parser, report
from distributed import Client, LocalCluster

from distkv_dask import Completion, Engine, SamplingParams
from distkv_dask.placement import Stage
from distkv_dask.worker.model.load import load_model
from distkv_dask.worker.model.loaded import LoadedModel
from distkv_dask.worker.model.no_attention import NoAttention

Cases = dict[str, tuple[int, int]]
"""Name of a case -> tokens of a step, and how many of them have their logits computed."""


def save_model(folder: str, options: Any) -> int:
    """Save a Llama with random weights; returns their bytes."""
    torch.manual_seed(0)
    none = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
    config = transformers.LlamaConfig(
        hidden_size=options.hidden, intermediate_size=3 * options.hidden, num_hidden_layers=options.layers, head_dim=64,
        num_attention_heads=options.hidden // 64, num_key_value_heads=max(1, options.hidden // 256), vocab_size=8192,
        max_position_embeddings=1 << 14, initializer_range=0.1, **none,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, options.dtype))
    model.save_pretrained(folder)
    return sum(weight.nbytes for weight in model.parameters())


class Bounds:
    """All stages of a model in this process, and the best time of each for each case so far.

    Parameters
    ----------
    folder
        The model.
    count
        Number of stages.
    cases
        What is measured.
    """

    def __init__(self, folder: str, count: int, cases: Cases) -> None:
        self._stages = [load_model(folder, "auto", 1, stage=Stage(number, count)) for number in range(count)]
        self._cases = cases
        self.seconds: dict[str, list[float]] = {name: [float("inf")] * count for name in cases}

    def measure(self) -> None:
        """Measure all stages once more."""
        for name, (tokens, keep) in self._cases.items():
            for at, model in enumerate(self._stages):
                repeats = max(2, 16 // tokens)
                best = min(_seconds(model, at, tokens, keep) for _ in range(repeats))
                self.seconds[name][at] = min(self.seconds[name][at], best)


def _seconds(model: LoadedModel, number: int, tokens: int, keep: int) -> float:
    """Seconds of one forward over a stage's layers; the home's are those with the head."""
    positions, step = torch.arange(tokens), NoAttention(model.geometry.value_dim)
    hidden = torch.randn(tokens, model.hidden_size).to(model.dtype)
    began = time.perf_counter()
    if number:
        model.further(hidden, positions, step)
    else:
        model.forward(positions, positions, step, torch.arange(tokens - keep, tokens))
    return time.perf_counter() - began


def rates(engine: Engine, options: Any, seed: int) -> dict[str, float]:
    """Tokens per second of one turn."""
    draw = torch.Generator().manual_seed(seed)

    def prompts(count: int, size: int) -> list[list[int]]:
        return torch.randint(0, 8192, (count, size), generator=draw).tolist()

    answer = SamplingParams(max_new_tokens=options.new, ignore_eos=True)
    (one,) = engine.generate(prompts(1, 16), answer)
    many = engine.generate(prompts(options.batch, 16), answer)
    (read,) = engine.generate(prompts(1, options.prompt), SamplingParams(max_new_tokens=1, ignore_eos=True))
    return {
        "decode 1": _decode_rate([one]),
        f"decode {options.batch}": _decode_rate(many),
        "prefill": options.prompt / read.timings.prefill,
    }


def _decode_rate(done: Sequence[Completion]) -> float:
    """Tokens after the first ones, of all requests, per second of the longest decode."""
    return sum(len(one.token_ids) - 1 for one in done) / max(one.timings.decode for one in done)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--stages", type=int, default=2)
    arguments.add_argument("--layers", type=int, default=16)
    arguments.add_argument("--hidden", type=int, default=1024)
    arguments.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    arguments.add_argument("--batch", type=int, default=32)
    arguments.add_argument("--prompt", type=int, default=2048)
    arguments.add_argument("--chunk", type=int, default=512, help="distkv.prefill.chunk-tokens")
    arguments.add_argument("--new", type=int, default=64)
    arguments.add_argument("--turns", type=int, default=3)
    arguments.add_argument("--memory-limit", default="auto", help="of each worker, held by its nanny")
    options = arguments.parse_args()
    cases: Cases = {
        "decode 1": (1, 1),
        f"decode {options.batch}": (options.batch, options.batch),
        "prefill": (min(options.chunk, options.prompt), 1),
    }
    with tempfile.TemporaryDirectory(prefix="distkv-stages-") as folder:
        weights = save_model(folder, options)
        bounds = Bounds(folder, options.stages, cases)
        bounds.measure()
        turns, where = measure_engine(folder, options)
        bounds.measure()
    figures: dict[str, Any] = {"weights_bytes": weights, "stages": where}
    for name, (tokens, _) in cases.items():
        rate, seconds = statistics.median(turn[name] for turn in turns), bounds.seconds[name]
        figures[name] = {
            "tokens_per_second": rate,
            "bound": tokens / sum(seconds),
            "of_bound": rate * sum(seconds) / tokens,
            "of_slowest_stage": rate * max(seconds) / tokens,
        }
    report(figures, {name: value for name, value in vars(options).items() if name != "json"}, options.json)


def measure_engine(folder: str, options: Any) -> tuple[list[dict[str, float]], str]:
    """Rates of each turn, and which layers are where."""
    with (
        LocalCluster(
            n_workers=options.stages, threads_per_worker=1, dashboard_address=None, memory_limit=options.memory_limit
        ) as cluster,
        Client(cluster) as client,
        Engine(
            client, folder, stages=options.stages, kv_memory="256 MiB", prefix_cache=False, speculation="off",
            prefill_chunk_tokens=options.chunk,
        ) as engine,
    ):  # fmt: skip
        turns = [rates(engine, options, seed) for seed in range(options.turns + 1)][1:]
        (home,) = engine.status().workers.values()
    return turns, home.weights


if __name__ == "__main__":
    main()
