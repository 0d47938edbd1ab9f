"""A decoder layer of Llama's architecture for few rows, without attention, in the C++ core (native/decoder_layer.h).

With few rows, norms, rotary embeddings, activations and residuals take as long as matrix products, because each torch
operation takes microseconds to start. Here a layer takes two calls.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from . import native_kernel
from .few_rows import FewRows
from .native_structures import PackedDecoderLayer

MULTIPLE = 32
"""All sizes are multiples of this."""


@dataclass(frozen=True, slots=True)
class Norm:
    """A root mean square norm: ``weight * x / sqrt(mean(x^2) + epsilon)``, where the quotient is rounded to bfloat16.

    Attributes
    ----------
    weight
        [size], bfloat16.
    epsilon
        Added to the mean.
    """

    weight: Tensor
    epsilon: float


@dataclass(frozen=True, slots=True)
class Parts:
    """The parts of a layer.

    Attributes
    ----------
    query, key, value, output
        Linears of attention.
    gate, up, down
        Linears of the MLP, which is ``down(silu(gate) * up)``.
    norm, mlp_norm
        Norms before attention and before the MLP.
    query_norm, key_norm
        Norms of each head before its rotary embedding, or None.
    head_dim
        Head size of queries, keys and values.
    """

    query: FewRows
    key: FewRows
    value: FewRows
    output: FewRows
    gate: FewRows
    up: FewRows
    down: FewRows
    norm: Norm
    mlp_norm: Norm
    query_norm: Norm | None
    key_norm: Norm | None
    head_dim: int

    @property
    def linears(self) -> tuple[FewRows, ...]:
        """All linears, in the core's order."""
        return self.query, self.key, self.value, self.output, self.gate, self.up, self.down

    @property
    def norms(self) -> tuple[Norm | None, ...]:
        """All norms, in the core's order."""
        return self.norm, self.mlp_norm, self.query_norm, self.key_norm


class DecoderLayer:
    """The operations of a layer before and after its attention, rounded to bfloat16 where transformers' modules round.

    A row's bits do not depend on other rows.

    Parameters
    ----------
    parts
        The layer's parts, which :func:`is_served` accepts; for the same rows, all linears use the same kernels.

    Raises
    ------
    ValueError
        :func:`is_served` does not accept the parts.
    """

    def __init__(self, parts: Parts) -> None:
        if not is_served(parts):
            raise ValueError(f"parts: expected what is_served takes, got {_shapes(parts)}, heads of {parts.head_dim}")
        self._parts, self.head_dim = parts, parts.head_dim
        self.heads, self.kv_heads = (one.outputs // parts.head_dim for one in (parts.query, parts.key))
        self._kept = [None if one is None else one.weight.detach().contiguous() for one in parts.norms]
        weights = [None if one is None else one.data_ptr() for one in self._kept]
        sizes = parts.query.inputs, parts.gate.outputs, self.heads, self.kv_heads, parts.head_dim
        heads = 0.0 if parts.query_norm is None else parts.query_norm.epsilon
        self._layer = PackedDecoderLayer(
            *(one.address for one in parts.linears),
            *weights,
            *sizes,
            1,
            parts.norm.epsilon,
            parts.mlp_norm.epsilon,
            heads,
        )
        self._at = ctypes.addressof(self._layer)
        self._before, self._after = _functions()

    @property
    def most(self) -> int:
        """Maximum rows."""
        return self._parts.query.most

    def before_attention(self, hidden: Tensor, cosines: Tensor, sines: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, with norms and rotary embeddings, on torch's number of threads.

        Parameters
        ----------
        hidden
            Contiguous [T, size], bfloat16.
        cosines, sines
            Contiguous [T, head_dim], bfloat16, of the rows' positions.

        Returns
        -------
        tuple
            Contiguous [T, heads, head_dim], and twice [T, kv_heads, head_dim].
        """
        rows = hidden.shape[0]
        query = torch.empty((rows, self.heads, self.head_dim), dtype=torch.bfloat16)
        key = torch.empty((rows, self.kv_heads, self.head_dim), dtype=torch.bfloat16)
        value = torch.empty_like(key)
        self._layer.threads = torch.get_num_threads()
        status = self._before(
            self._at, self._parts.query.kernels(rows), hidden.data_ptr(), rows,
            cosines.data_ptr(), sines.data_ptr(), query.data_ptr(), key.data_ptr(), value.data_ptr(),
        )  # fmt: skip
        _check_memory(status, rows)
        return query, key, value

    def after_attention(self, hidden: Tensor, attended: Tensor) -> Tensor:
        """Hidden states after the layer [T, size], from those before it and attention's [T, heads, head_dim].

        All are contiguous.
        """
        rows, out = hidden.shape[0], torch.empty_like(hidden)
        self._layer.threads = torch.get_num_threads()
        status = self._after(
            self._at, self._parts.query.kernels(rows), hidden.data_ptr(), rows, attended.data_ptr(), out.data_ptr()
        )
        _check_memory(status, rows)
        return out


@lru_cache(maxsize=1)
def _functions() -> tuple[Any, Any]:
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    before = ctypes.CFUNCTYPE(ctypes.c_int, *[pointer] * 3, number, *[pointer] * 5)
    after = ctypes.CFUNCTYPE(ctypes.c_int, *[pointer] * 3, number, *[pointer] * 2)
    return (
        before(native_kernel.address("distkv_before_attention")),
        after(native_kernel.address("distkv_after_attention")),
    )


def is_served(parts: Parts) -> bool:
    """Whether the core takes a layer: all sizes are multiples of :data:`MULTIPLE`, and heads have one epsilon."""
    sizes = parts.query.inputs, parts.gate.outputs, parts.head_dim
    both = parts.query_norm, parts.key_norm
    epsilons = {one.epsilon for one in both if one is not None}
    weights = [one.weight for one in parts.norms if one is not None]
    return (
        not any(one % MULTIPLE for one in sizes)
        and (both[0] is None) == (both[1] is None)
        and len(epsilons) <= 1
        and all(weight.dtype == torch.bfloat16 for weight in weights)
        and _shapes(parts) == _expected(parts)
    )


def _shapes(parts: Parts) -> list[tuple[int, ...]]:
    linears = [(one.outputs, one.inputs) for one in parts.linears]
    return [*linears, *(tuple(one.weight.shape) for one in parts.norms if one is not None)]


def _expected(parts: Parts) -> list[tuple[int, ...]]:
    size, middle, d = parts.query.inputs, parts.gate.outputs, parts.head_dim
    heads, kv = (one.outputs // d * d for one in (parts.query, parts.key))
    linears = [(heads, size), (kv, size), (kv, size), (size, heads), (middle, size), (middle, size), (size, middle)]
    return [*linears, (size,), (size,), *[(d,), (d,)] * (parts.query_norm is not None)]


def _check_memory(status: int, rows: int) -> None:
    if status:
        raise MemoryError(f"no memory for a layer of {rows} rows")
