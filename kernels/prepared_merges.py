"""Merges the partial results of all workers at once: one launch per layer on a GPU."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from . import triton_kernel
from .prepared import PreparedMerge
from .triton_batch import launch_merge

Runs = Sequence[tuple[int, int, int, int]]


class PreparedMerges:
    """Merges partials that are in the same tensors in every call, always in the same order.

    Parameters
    ----------
    out, lse
        Results, float32 [tokens, heads, d] and [tokens, heads]; overwritten by each call.
    partials
        float32, flat: for each source its out [queries, heads, d], then its lse [queries, heads].
    queries
        Number of queries that each source answers.
    runs
        (source, query, token, count) in the order in which a token's partials are merged: ``count`` queries of a source
        from ``query`` on belong to the tokens from ``token`` on.

    Raises
    ------
    TypeError, ValueError
        Tensors are not float32, or sizes, runs and tensors do not fit together.
    """

    def __init__(
        self, out: torch.Tensor, lse: torch.Tensor, partials: torch.Tensor, queries: Sequence[int], runs: Runs
    ) -> None:
        tokens, heads, d = out.shape
        if partials.shape != (sum(queries) * heads * (d + 1),):
            raise ValueError(
                f"partials: expected shape [{sum(queries) * heads * (d + 1)}], got {tuple(partials.shape)}"
            )
        self._out, self._lse, self._partials = out, lse, partials
        sizes = [count * heads * (d + 1) for count in queries]
        self.sources = [
            (one[: count * heads * d].view(count, heads, d), one[count * heads * d :].view(count, heads))
            for one, count in zip(partials.split(sizes), queries, strict=True)
        ]
        """Views of ``partials``: out [queries, heads, d] and lse [queries, heads] of each source."""
        self._merges = []
        for source, query, token, count in runs:
            into, of = slice(token, token + count), slice(query, query + count)
            part_out, part_lse = self.sources[source]
            self._merges.append(PreparedMerge(out[into], lse[into], part_out[of], part_lse[of]))
        self._table: tuple[torch.Tensor, torch.Tensor] | None = None
        if triton_kernel.unsupported(out.device.type, 1, d) is None and out.is_contiguous() and lse.is_contiguous():
            self._table = merge_table(tokens, d, queries, runs, out.device)

    def __call__(self) -> None:
        """Merge the current partials."""
        if self._table is not None:
            launch_merge((self._partials, *self._table), self._out, self._lse)
            return
        self._out.zero_()
        self._lse.fill_(-torch.inf)
        for merge in self._merges:
            merge()


def merge_table(
    tokens: int, d: int, queries: Sequence[int], runs: Runs, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """The tables of the merge kernel (``merge_partials`` in triton_merge.py): int32 [tokens, 2] and int32 [n, 2]."""
    source, query, token, count = np.array(runs, np.int64).reshape(-1, 4).T
    run = np.repeat(np.arange(len(count)), count)
    nth = np.arange(len(run)) - np.repeat(np.cumsum(count) - count, count)
    sizes = np.array(queries, np.int64)
    begins = (np.cumsum(sizes) - sizes) * (d + 1)
    source, query, token = source[run], query[run] + nth, token[run] + nth
    order = np.argsort(token, kind="stable")
    entries = np.stack((begins[source] + query * d, begins[source] + sizes[source] * d + query), 1)[order]
    counts = np.bincount(token, minlength=tokens)
    firsts = np.stack((np.cumsum(counts) - counts, counts), 1)
    both = (torch.from_numpy(table.astype(np.int32)).to(device) for table in (firsts, entries))
    return next(both), next(both)
