"""How fast are the linears of a step, by number of rows: torch, oneDNN with packed weights, and the C++ core?

All layers' linears of SmolLM2-135M's or an 8B model's sizes (a few layers of the latter), with random bfloat16 weights,
one after the other as in a step, in turns. The floor is the time to read the weights at the rate at which this run
reads memory.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from _report import parser, report
from _roof import read_roof
from torch import Tensor

from distkv_dask.worker.model.linear_choice import ROWS, Product, candidates, chosen
from distkv_dask.worker.model.packed import in_words

MODELS = {
    "135M": (30, ((576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536))),
    "8B": (3, ((4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), (12288, 4096), (12288, 4096), (4096, 12288))),
}
"""Layers, and the outputs and inputs of a layer's linears."""


def weights_of(layers: int, shapes: tuple[tuple[int, int], ...]) -> list[Tensor]:
    """Random weights of the linears of all layers."""
    torch.manual_seed(0)
    return [torch.randn(shape).bfloat16() for _ in range(layers) for shape in shapes]


def seconds(linears: list[Product], given: list[Tensor]) -> float:
    """Of one step."""
    began = time.perf_counter()
    for product, rows in zip(linears, given, strict=True):
        product(rows)
    return time.perf_counter() - began


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    arguments.add_argument("--rows", nargs="+", type=int, default=[1, 4, 8, 16, 32, 64, 128, 256, 512])
    arguments.add_argument("--threads", type=int, default=1)
    arguments.add_argument("--turns", type=int, default=7)
    options = arguments.parse_args()
    if max(options.rows) > ROWS[-1]:
        arguments.error(f"--rows: at most {ROWS[-1]}")
    torch.set_num_threads(options.threads)
    figures: dict[str, Any] = {"chosen": in_words(chosen().few)}
    read, size = read_roof("cpu", options.threads)
    with torch.inference_mode():
        for model in options.models:
            layers, shapes = MODELS[model]
            weights = weights_of(layers, shapes)
            made, size_of_all = candidates(weights), sum(weight.nbytes for weight in weights)
            for rows in options.rows:
                given = [torch.randn(rows, inputs).bfloat16() for _ in range(layers) for _, inputs in shapes]
                best, rates = dict.fromkeys(made, float("inf")), [0.0]
                for _ in range(options.turns):
                    began = time.perf_counter()
                    read()
                    rates.append(size / (time.perf_counter() - began))
                    for name, linears in made.items():
                        best[name] = min(best[name], seconds(linears, given))
                floor = size_of_all / max(rates)
                figures[f"{model}, {rows} rows: ms"] = {name: round(1e3 * one, 2) for name, one in best.items()}
                figures[f"{model}, {rows} rows: floor_ms"] = round(1e3 * floor, 2)
                figures[f"{model}, {rows} rows: ratio"] = {name: round(one / floor, 2) for name, one in best.items()}
    named = {name: getattr(options, name) for name in ("models", "rows", "threads", "turns")}
    report(figures, named, options.json)


if __name__ == "__main__":
    main()
