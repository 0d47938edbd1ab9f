"""Sparse rows (PowerInfer, arXiv 2312.12456): if a ReLU gave 0, the row of the down projection is not needed.

Skipping such rows is exact: they would be multiplied by 0. It pays for few tokens and many zeros; the limits are
measured when a model is loaded. For this, the weights are stored row by row, as [inner, hidden].
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

ACTIVATIONS = frozenset(("relu", "relu2", "relu6"))
"""transformers' names of activations that give exact zeros."""

_ACTIVATION_KEYS = "hidden_act", "activation_function", "mlp_hidden_act", "hidden_activation"
_INNER_KEYS = "intermediate_size", "ffn_dim"
_TOKENS = (1, 2, 4, 8)
"""Tokens of a step in the measurement."""
_SHARES = (0.05, 0.5)
"""Parts of nonzero activations in the measurement."""
_TRIED = 4
"""Layers in the measurement: too many for the caches."""


@dataclass(slots=True)
class RowCounts:
    """Bytes of down projections in steps of few tokens.

    Parameters
    ----------
    dense, read
        All bytes, and those that were read.
    limits
        Tokens of a step -> activations other than 0, in all tokens together, up to which skipping pays.
    """

    limits: dict[int, float] = field(default_factory=dict)
    dense: int = 0
    read: int = 0

    @property
    def most_tokens(self) -> int:
        """Maximum tokens of a step in which rows are skipped."""
        return max((tokens for tokens, limit in self.limits.items() if limit), default=0)

    def limit(self, tokens: int) -> float:
        """Maximum nonzero activations in a step for which skipping pays; 0 if it never does."""
        if tokens > _TOKENS[-1]:
            return 0.0
        return self.limits.get(max(one for one in _TOKENS if one <= tokens), 0.0)


def has_sparse_rows(config: Any) -> bool:
    """Whether a configuration's text model has activations that give exact zeros."""
    text = config.get_text_config()
    return any(getattr(text, key, None) in ACTIVATIONS for key in _ACTIVATION_KEYS)


def down_projections(model: Any) -> Iterator[nn.Linear]:
    """The linears of a transformers model from inner activations to hidden ones."""
    text = model.config.get_text_config()
    inner = {getattr(text, key, None) for key in _INNER_KEYS}
    for module in model.modules():
        if type(module) is nn.Linear and module.in_features in inner and module.out_features == text.hidden_size:
            yield module


def lay_in_rows(model: Any) -> None:
    """Store the weights of down projections row by row, as [inner, hidden], without changing values and shapes."""
    for linear in down_projections(model):
        linear.weight.data = linear.weight.data.t().contiguous().t()


def skip_zero_rows(model: Any) -> RowCounts:
    """Let down projections skip rows of zero activations if that pays.

    Parameters
    ----------
    model
        A transformers model whose weights :func:`lay_in_rows` has stored.
    """
    linears = list(down_projections(model))
    counts = RowCounts(measured_limits(linears[:_TRIED]) if linears else {})
    if any(counts.limits.values()):
        for linear in linears:
            linear.forward = SparseLinear(linear.weight, linear.bias, counts)  # type: ignore[assignment]
    return counts


class SparseLinear:
    """A linear that reads only the needed rows, if they are few.

    Parameters
    ----------
    weight
        [out, in], whose columns are contiguous in memory.
    bias
        [out], if there is one.
    counts
        When to skip rows, and counts of bytes read.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, counts: RowCounts) -> None:
        self._weight = weight
        self._bias = bias
        self._counts = counts

    def __call__(self, inner: Tensor) -> Tensor:
        """From [..., in] to [..., out]."""
        flat, weight, counts = inner.flatten(0, -2), self._weight, self._counts
        if limit := counts.limit(len(flat)):
            where = flat.nonzero()
            pays = len(where) <= limit
            counts.dense += weight.nbytes
            counts.read += min(weight.nbytes, len(where) * weight.shape[0] * weight.itemsize) if pays else weight.nbytes
            if pays:
                return sparse_product(flat, where, weight, self._bias).view(*inner.shape[:-1], -1)
        return functional.linear(inner, weight, self._bias)


def sparse_product(flat: Tensor, where: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Product of rows with a weight, by their nonzero elements.

    Parameters
    ----------
    flat
        [rows, in].
    where
        int64 [n, 2]: positions of their nonzero elements, row by row.
    weight, bias
        As :class:`SparseLinear` takes them.
    """
    rows, columns = where.unbind(1)
    starts = torch.searchsorted(rows.contiguous(), torch.arange(len(flat)))
    out = functional.embedding_bag(
        columns.contiguous(), weight.t(), starts, mode="sum", per_sample_weights=flat[rows, columns]
    )
    return out if bias is None else out + bias


def measured_limits(linears: Sequence[nn.Linear]) -> dict[int, float]:
    """Time some linears; the limits of :class:`RowCounts`."""
    generator, limits = torch.Generator().manual_seed(0), dict[int, float]()
    with torch.inference_mode():
        for tokens in _TOKENS:
            shape = tokens, linears[0].in_features
            drawn, values = torch.rand(shape, generator=generator), torch.randn(shape, generator=generator)
            inner = [(values * (drawn < share)).to(linears[0].weight.dtype) for share in _SHARES]
            few, many = (_seconds(linears, one, _sparse) for one in inner)
            dense = _seconds(linears, inner[1], _dense)
            counts = [int(one.count_nonzero()) for one in inner]
            slope = max(1e-12, (many - few) / (counts[1] - counts[0]))
            limits[tokens] = max(0.0, (dense - few) / slope + counts[0])
    return limits


def _dense(linear: nn.Linear, inner: Tensor) -> Tensor:
    return functional.linear(inner, linear.weight, linear.bias)


def _sparse(linear: nn.Linear, inner: Tensor) -> Tensor:
    return sparse_product(inner, inner.nonzero(), linear.weight, linear.bias)


def _seconds(linears: Sequence[nn.Linear], inner: Tensor, compute: Callable[[nn.Linear, Tensor], Tensor]) -> float:
    """Seconds of one product: the best of three rounds over the linears, after one that is not counted."""
    rounds = []
    for _ in range(4):
        began = time.perf_counter()
        for linear in linears:
            compute(linear, inner)
        rounds.append((time.perf_counter() - began) / len(linears))
    return min(rounds[1:])
