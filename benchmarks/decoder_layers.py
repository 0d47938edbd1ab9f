"""How fast are decoder layers without attention in transformers and in the C++ core, by number of rows?

Layers have the sizes of SmolLM2-135M or of an 8B model (only a few layers) and random bfloat16 weights. Three
implementations take turns: transformers' modules, the same modules with packed linears, and the core's two calls per
layer. Attention returns its queries. The floor is the time to read the weights at the rate at which this run reads
memory.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import torch
from _report import report
from _rows import NAMES, Runs, measured, options_of
from transformers import AutoModelForCausalLM, LlamaConfig

from distkv_dask.geometry import Geometry
from distkv_dask.worker.model.decoder_layers import use_core
from distkv_dask.worker.model.hook import IMPLEMENTATION, attending_with
from distkv_dask.worker.model.no_attention import NoAttention
from distkv_dask.worker.model.packed import in_words, pack_linears
from distkv_dask.worker.timing.linear_choice import chosen

MODELS = {"135M": (30, 576, 1536, 9, 3, 64), "8B": (3, 4096, 12288, 32, 8, 128)}
"""Layers, size, size of the MLP, heads, KV heads, and size of a head."""
VOCABULARY = 64
"""Small, because logits are not part of the measurement."""


def model_of(layers: int, size: int, middle: int, heads: int, kv_heads: int, head_dim: int) -> tuple[Any, Geometry]:
    """A Llama with random weights, and its sizes."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=size,
        intermediate_size=middle,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=IMPLEMENTATION).eval()
    return model, Geometry(layers, heads, kv_heads, head_dim, VOCABULARY, config.max_position_embeddings, "bfloat16")


def seconds(model: Any, sizes: Geometry, rows: int) -> float:
    """Seconds of one forward."""
    ids, positions = torch.zeros(1, rows, dtype=torch.int64), torch.arange(rows)[None]
    last = torch.tensor([rows - 1])
    with attending_with(NoAttention(sizes.head_dim), positions[0], sizes):
        began = time.perf_counter()
        model(input_ids=ids, position_ids=positions, use_cache=False, logits_to_keep=last)
        return time.perf_counter() - began


def variants(sizes: tuple[int, int, int, int, int, int]) -> dict[str, tuple[Any, Geometry]]:
    """Models with the same weights, by implementation."""
    made = {name: model_of(*sizes) for name in ("transformers", "packed linears", "C++ layers")}
    for name, (model, _) in made.items():
        if name != "transformers":
            pack_linears(model, 1 << 40, chosen)
        if name == "C++ layers":
            use_core(model)
    return made


def cases(models: Iterable[str], numbers: Iterable[int]) -> Iterator[tuple[str, int, int, Runs]]:
    """Cases for :func:`_rows.measured` of these models and numbers of rows."""
    for name in models:
        made = variants(MODELS[name])
        weights = sum(weight.nbytes for weight in made["transformers"][0].model.layers.parameters())
        for rows in numbers:
            yield name, rows, weights, {way: partial(seconds, *both, rows) for way, both in made.items()}


def main() -> None:
    options = options_of(__doc__, MODELS, (1, 4, 8, 32, 128, 512))
    figures = {"chosen": in_words(chosen().few) or "no products of the core"}
    figures |= measured(cases(options.models, options.rows), options.threads, options.turns)
    report(figures, {name: getattr(options, name) for name in NAMES}, options.json)


if __name__ == "__main__":
    main()
