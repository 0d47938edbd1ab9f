"""Exact combination of partial attention results by log-sum-exp (paper section 4, DistAttention)."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from . import native_kernel


def merge_into(
    out: torch.Tensor,
    lse: torch.Tensor,
    part_out: torch.Tensor,
    part_lse: torch.Tensor,
    index: torch.Tensor | None = None,
) -> None:
    """Merge one partial result into an accumulated one, in place.

    Parameters
    ----------
    out, lse
        Accumulated result, float32 [tokens, heads, d] and [tokens, heads]; changed in place.
    part_out, part_lse
        Partial result, float32 [n, heads, d] and [n, heads]. A partial over no keys is (0, -inf) and changes nothing.
    index
        int64 [n], distinct: the tokens that the partial's rows belong to; None when n == tokens.

    Raises
    ------
    TypeError
        A tensor is not float32 (index: int64).
    ValueError
        Shapes do not fit, or an index is out of range or given twice.
    """
    check_merge(out, lse, part_out, part_lse, index)
    if native_serves(out, lse, part_out, part_lse, index):
        if not native_kernel.merge_into(out, lse, part_out, part_lse, index):
            raise ValueError(index_message(len(out)))
        return
    if index is not None:
        check_index(index, len(out))
    merge_rows(out, lse, part_out, part_lse, index)


def merge(partials: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge any number (at least one) of partial results of the same queries, in any order.

    Parameters
    ----------
    partials
        Pairs (out float32 [tokens, heads, d], lse float32 [tokens, heads]).

    Returns
    -------
    tuple
        New tensors (out, lse).

    Raises
    ------
    ValueError
        There is no partial, or their shapes differ.
    """
    pairs = iter(partials)
    first = next(pairs, None)
    if first is None:
        raise ValueError("partials: expected at least one (out, lse) pair")
    out, lse = first[0].clone(), first[1].clone()
    for part_out, part_lse in pairs:
        merge_into(out, lse, part_out, part_lse)
    return out, lse


def merge_tensors(out: torch.Tensor, lse: torch.Tensor, part_out: torch.Tensor, part_lse: torch.Tensor) -> None:
    """Merge tensors of equal shape in place with torch operations (any device); nothing is checked."""
    weight = torch.sigmoid(part_lse - lse).nan_to_num_(0.0)  # NaN: both -inf, nothing on either side
    out.lerp_(part_out, weight[..., None])
    torch.logaddexp(lse, part_lse, out=lse)


def merge_sinks(out: torch.Tensor, lse: torch.Tensor, sinks: torch.Tensor) -> None:
    """Merge a key that every query sees and whose value is zero (an attention sink) into ``out``, in place.

    Parameters
    ----------
    out
        float32 [tokens, heads, d].
    lse
        float32 [tokens, heads], natural logarithm; not changed.
    sinks
        [heads], any float dtype: the score of that key.
    """
    out.mul_(torch.sigmoid(lse - sinks)[..., None])


def merge_rows(
    out: torch.Tensor, lse: torch.Tensor, part_out: torch.Tensor, part_lse: torch.Tensor, index: torch.Tensor | None
) -> None:
    """Merge with torch operations (any device) and without host synchronization; nothing is checked."""
    if index is None:
        merge_tensors(out, lse, part_out, part_lse)
        return
    sub_out, sub_lse = out.index_select(0, index), lse.index_select(0, index)
    merge_tensors(sub_out, sub_lse, part_out, part_lse)
    out.index_copy_(0, index, sub_out)
    lse.index_copy_(0, index, sub_lse)


def check_index(index: torch.Tensor, tokens: int) -> None:
    """Raise ValueError for values that are not distinct tokens; on a GPU this synchronizes once."""
    ordered = index.sort().values
    bad = ((ordered < 0) | (ordered >= tokens)).any() | (ordered[1:] == ordered[:-1]).any()
    if bool(bad):
        raise ValueError(index_message(tokens))


def index_message(tokens: int) -> str:
    """Text of the error for an index that does not say which tokens a partial's rows belong to."""
    return f"index: expected distinct values from 0 to {tokens - 1}"


def native_serves(*tensors: torch.Tensor | None) -> bool:
    """Whether the C++ core can merge these tensors."""
    return native_kernel.missing() is None and all(
        tensor is None or (tensor.is_cpu and tensor.is_contiguous()) for tensor in tensors
    )


def check_merge(
    out: torch.Tensor, lse: torch.Tensor, part_out: torch.Tensor, part_lse: torch.Tensor, index: torch.Tensor | None
) -> None:
    """Raise for tensors that :func:`merge_into` does not take, except for the values of ``index``."""
    for name, tensor in (("out", out), ("lse", lse), ("part_out", part_out), ("part_lse", part_lse)):
        if not isinstance(tensor, torch.Tensor) or tensor.dtype != torch.float32:
            raise TypeError(f"{name}: expected a float32 tensor, got {getattr(tensor, 'dtype', type(tensor).__name__)}")
    if out.ndim != 3 or lse.shape != out.shape[:2]:
        raise ValueError(f"lse: expected the first two dimensions of out {tuple(out.shape)}, got {tuple(lse.shape)}")
    count = out.shape[0]
    if index is not None:
        if not isinstance(index, torch.Tensor) or index.dtype != torch.int64:
            raise TypeError("index: expected an int64 tensor")
        if index.ndim != 1:
            raise ValueError(f"index: expected shape [n], got {tuple(index.shape)}")
        count = index.shape[0]
    if part_out.shape != (count, *out.shape[1:]) or part_lse.shape != part_out.shape[:2]:
        wanted = (count, *out.shape[1:])
        raise ValueError(
            f"part_out, part_lse: expected shapes {wanted} and {wanted[:2]}, "
            f"got {tuple(part_out.shape)} and {tuple(part_lse.shape)}"
        )
