"""Memory that a model's weights take, from the headers of their files: known before anything is loaded."""

from __future__ import annotations

import math
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
"""Bytes of a number by safetensors' names; of all others one."""

_CONVERTED = frozenset(("F64", "F32", "BF16", "F16"))
"""Dtypes that are converted to the model's; of quantised weights only scales have them."""

_DTYPES: Mapping[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2}

COUNTED = "weights.json"
"""File next to a converted GGUF file's configuration: how many numbers each dtype of its weights has."""


def stored_numbers(files: Iterable[Path]) -> Counter[str]:
    """Numbers in safetensors files, by safetensors' name of their dtype, without parts that a text model leaves out."""
    from safetensors import safe_open

    numbers: Counter[str] = Counter()
    for file in files:
        with safe_open(file, framework="np") as opened:
            for name in opened.keys():  # noqa: SIM118 (it is no mapping)
                if not beside_the_text_model(name):
                    tensor = opened.get_slice(name)
                    numbers[tensor.get_dtype()] += math.prod(tensor.get_shape())
    return numbers


def counted_numbers(folder: Path) -> Counter[str]:
    """Numbers in a GGUF file whose configuration was converted into ``folder``."""
    return Counter(read_json(folder / COUNTED))


def kv_beside(weights: int, limit: int) -> int:
    """Bytes of KV memory that a worker with a memory limit has by default: half of what the weights leave of it."""
    return max(0, limit - weights) // 2


def shared_limit(weights: int, workers: int, memory: int) -> int:
    """Memory limit, in bytes, of each of some workers of a machine that share a model's weights.

    Dask counts the weights in each of them. So beside its part of the machine, each gets what it shares.

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
        As ``Engine`` takes it; ``auto`` is that of the configuration, or else they stay as they are.

    Examples
    --------
    >>> from types import SimpleNamespace
    >>> memory_of({"BF16": 100, "I8": 10}, SimpleNamespace(dtype=None), "float32")
    410
    """
    target = str(getattr(config, "dtype", None)).removeprefix("torch.") if dtype == "auto" else dtype
    return sum(
        number * (_DTYPES[target] if stored in _CONVERTED and target in _DTYPES else _BYTES.get(stored, 1))
        for stored, number in numbers.items()
    )
