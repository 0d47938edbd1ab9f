"""How fast are a step's linears in torch, in oneDNN with packed weights and in the C++ core, by number of rows?

The linears of all layers have the sizes of SmolLM2-135M or of an 8B model (only a few layers) and random bfloat16
weights. They run one after the other, as in a step, and the implementations take turns; the core also with packed
weights mapped from a file, as those of large models are. The floor is the time to read the weights at the rate at which
this run reads memory.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from _report import report
from _rows import NAMES, Runs, measured, options_of
from torch import Tensor

from distkv_dask.kernels import few_rows
from distkv_dask.worker.model.packed import in_words
from distkv_dask.worker.model.packed_file import packed_once
from distkv_dask.worker.timing.linear_choice import ROWS, Product, candidates, chosen

MODELS = {
    "135M": (30, ((576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536))),
    "8B": (3, ((4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), (12288, 4096), (12288, 4096), (4096, 12288))),
}
"""Layers, and the outputs and inputs of a layer's linears."""


def weights_of(layers: int, shapes: tuple[tuple[int, int], ...]) -> list[Tensor]:
    """Random weights of the linears of all layers."""
    torch.manual_seed(0)
    return [torch.randn(shape).bfloat16() for _ in range(layers) for shape in shapes]


def mapped(weights: list[Tensor], folder: str) -> dict[str, list[Product]]:
    """The core's products of packed weights that are mapped from a file in a folder."""
    named = {str(at): weight for at, weight in enumerate(weights)}
    found = packed_once(named, Path(folder, "packed.safetensors"), lambda _: None) or {}
    return {
        f"{name}, mapped": [
            few_rows.FewRows(found[at], (weight.shape[0], weight.shape[1]), None, ((ROWS[-1], name),))
            for at, weight in named.items()
        ]
        for name in (few_rows.sets() if found else ())
    }


def seconds(linears: list[Product], given: list[Tensor]) -> float:
    """Seconds of one step."""
    began = time.perf_counter()
    for product, rows in zip(linears, given, strict=True):
        product(rows)
    return time.perf_counter() - began


def cases(models: Iterable[str], numbers: Iterable[int]) -> Iterator[tuple[str, int, int, Runs]]:
    """Cases for :func:`_rows.measured` of these models and numbers of rows."""
    for model in models:
        layers, shapes = MODELS[model]
        weights = weights_of(layers, shapes)
        size = sum(weight.nbytes for weight in weights)
        with TemporaryDirectory(prefix="distkv-") as folder:
            made = candidates(weights) | mapped(weights, folder)
            for rows in numbers:
                given = [torch.randn(rows, inputs).bfloat16() for _ in range(layers) for _, inputs in shapes]
                yield model, rows, size, {name: partial(seconds, linears, given) for name, linears in made.items()}


def main() -> None:
    options = options_of(__doc__, MODELS, (1, 4, 8, 16, 32, 64, 128, 256, 512))
    figures = {"chosen": in_words(chosen().few)}
    figures |= measured(cases(options.models, options.rows), options.threads, options.turns)
    report(figures, {name: getattr(options, name) for name in NAMES}, options.json)


if __name__ == "__main__":
    main()
