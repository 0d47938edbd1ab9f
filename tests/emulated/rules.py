"""Properties of operations: which make the host wait, which launch no kernel, which use only some rows of a tensor."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from emulated.shadow import Region

aten = torch.ops.aten

INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
"""These also take indices from the host: they copy them, and wait for the copy."""

_STOPS = {
    "_local_scalar_dense", "nonzero", "masked_select", "unique_dim", "unique_consecutive", "_unique2",
    "unique_dim_consecutive", "equal", "bincount",
}  # fmt: skip
"""Operations that read the size or value of their result from the device."""

_NO_KERNELS = {
    "empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "_unsafe_view", "lift_fresh",
    "_local_scalar_dense", "is_same_size", "_reshape_alias", "detach_",
}  # fmt: skip


class Signature(NamedTuple):
    """Properties of an operation from its schema."""

    name: str
    names: tuple[str, ...]
    """Names of its arguments."""
    written: frozenset[str]
    """Arguments that it changes."""
    is_view: bool
    launches: bool
    composed: bool
    """Whether it is composed of other operations."""


@cache
def signature(func: torch._ops.OpOverload) -> Signature:
    """The signature of an operation."""
    schema = func._schema
    name = schema.name.removeprefix("aten::")
    written = (one.name for one in schema.arguments if one.alias_info is not None and one.alias_info.is_write)
    return Signature(
        name, tuple(one.name for one in schema.arguments), frozenset(written), func.is_view,
        not func.is_view and name not in _NO_KERNELS, func._can_decompose(),
    )  # fmt: skip


def stops(func: torch._ops.OpOverload, args: Sequence[Any]) -> bool:
    """Whether an operation makes the host wait for its result."""
    if func in INDEXING:
        masks = [one for one in args[1] if one is not None and one.dtype in (torch.bool, torch.uint8)]
        filled = func is not aten.index.Tensor and len(args[1]) == 1 and args[2].numel() == 1
        return bool(masks) and not filled
    if func is aten.repeat_interleave.Tensor:
        return len(args) < 2
    return signature(func).name in _STOPS


def regions(func: torch._ops.OpOverload, args: Sequence[Any]) -> dict[int, Region]:
    """Regions of the tensors that an operation uses, by ``id``, for those of which it uses only some rows."""
    if func in INDEXING:
        return {id(args[0]): _indexed(args[0], list(args[1]))}
    if signature(func).name in ("index_select", "index_copy_", "index_add_", "index_fill_"):
        _, dim, index = args[:3]
        return {id(args[0]): _indexed(args[0], [None] * (dim % args[0].dim()) + [index])}
    if func is aten.embedding.default:
        return {id(args[0]): _indexed(args[0], [args[1]])}
    return {}


def _indexed(held: Tensor, indices: list[Tensor | None]) -> Region:
    """The region that indices select: row numbers (or a mask) by dimension, None for all of a dimension."""
    rows: Any = np.zeros(1, np.int64)
    taken = []
    for dim, index in enumerate(indices):
        if index is None:
            continue
        if index.dtype in (torch.bool, torch.uint8):
            return Region.of(held)
        numbers = index.numpy().astype(np.int64)
        rows = rows + np.where(numbers < 0, numbers + held.shape[dim], numbers) * held.stride(dim)
        taken.append(dim)
    left = [dim for dim in range(held.dim()) if dim not in taken]
    sizes, strides = tuple(held.shape[dim] for dim in left), tuple(held.stride(dim) for dim in left)
    return Region(held.storage_offset(), sizes, strides, held.element_size(), np.asarray(rows).ravel())
