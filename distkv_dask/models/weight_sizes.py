"""Memory of a model's weights, from the headers of their files, before anything is loaded."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from distkv_dask.models.complete import beside_the_text_model
from distkv_dask.models.files import read_json

_BYTES: Mapping[str, int] = {
    **dict.fromkeys(("F64", "I64", "U64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("BF16", "F16", "I16", "U16"), 2),
}
"""Bytes of a number by safetensors' names of dtypes; all others have one."""

_CONVERTED = frozenset(("F64", "F32", "BF16", "F16"))
"""Dtypes that are converted to the model's; of quantised weights only scales have them."""

_DTYPES: Mapping[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2}

_STORED: Mapping[str, str] = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}

_LAYER = re.compile(r"\.(\d+)\.")

COUNTED = "weights.json"
"""File next to a converted GGUF file's configuration: how many numbers each dtype of its weights has."""


def stored_numbers(files: Iterable[Path]) -> Counter[str]:
    """Numbers in safetensors files, by safetensors' name of their dtype, without parts that a text model leaves out."""
    return sum(numbers_by_layer(files).values(), Counter())


def numbers_by_layer(files: Iterable[Path]) -> dict[str, Counter[str]]:
    """The same by layer, from the names of tensors; those outside of layers are under ``""``."""
    from safetensors import safe_open

    layers: dict[str, Counter[str]] = {}
    for file in files:
        with safe_open(file, framework="np") as opened:
            for name in opened.keys():  # noqa: SIM118 (it is no mapping)
                if not beside_the_text_model(name):
                    tensor, layer = opened.get_slice(name), _LAYER.search(name)
                    numbers = layers.setdefault(layer[1] if layer else "", Counter())
                    numbers[tensor.get_dtype()] += math.prod(tensor.get_shape())
    return layers


def counted_numbers(folder: Path) -> Counter[str]:
    """Numbers in a GGUF file whose configuration was converted into ``folder``."""
    return Counter(read_json(folder / COUNTED))


def disk_memory_of(layers: Mapping[str, Mapping[str, int]], config: Any, dtype: str) -> int | None:
    """Bytes in memory if layers are read from disk: of two layers, and of weights outside of layers.

    Parameters
    ----------
    layers
        As :func:`numbers_by_layer` counts them.
    config, dtype
        As :func:`memory_of` takes them.

    Returns
    -------
    int or None
        None if weights would be converted, so that they cannot be read directly.
    """
    target = _STORED.get(_target(config, dtype))
    if target is not None and any(stored in _CONVERTED - {target} for numbers in layers.values() for stored in numbers):
        return None
    sizes = {layer: memory_of(numbers, config, dtype) for layer, numbers in layers.items()}
    outside = sizes.pop("", 0)
    return outside + 2 * max(sizes.values(), default=0)


def kv_beside(weights: int, limit: int) -> int:
    """Bytes of KV memory that a worker with a memory limit has by default: half of what the weights leave of it."""
    return max(0, limit - weights) // 2


def shared_limit(weights: int, workers: int, memory: int) -> int:
    """Memory limit, in bytes, of each of some workers of a machine that share a model's weights.

    Dask counts the weights in each of them. So each gets its part of the machine, and in addition what it shares.

    Examples
    --------
    >>> shared_limit(10, workers=4, memory=50)
    20
    """
    return max(0, memory - weights) // workers + weights


def memory_of(numbers: Mapping[str, int], config: Any, dtype: str) -> int:
    """Bytes of weights in memory.

    Parameters
    ----------
    numbers
        As :func:`stored_numbers` counts them.
    config
        The model's transformers configuration.
    dtype
        As for ``Engine``; ``auto`` is that of the configuration, or else of the files.

    Examples
    --------
    >>> from types import SimpleNamespace
    >>> memory_of({"BF16": 100, "I8": 10}, SimpleNamespace(dtype=None), "float32")
    410
    """
    target = _target(config, dtype)
    return sum(
        number * (_DTYPES[target] if stored in _CONVERTED and target in _DTYPES else _BYTES.get(stored, 1))
        for stored, number in numbers.items()
    )


def _target(config: Any, dtype: str) -> str:
    """Name of torch's dtype into which weights are converted; another text if they are not converted."""
    return str(getattr(config, "dtype", None)).removeprefix("torch.") if dtype == "auto" else dtype
