"""Parts of embeddings: sums of the hidden states of chunks' tokens, step by step."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from distkv_dask.gang import Pooled, PrefillChunk
from distkv_dask.worker.model.hidden_states import as_bytes, summed
from distkv_dask.worker.plan import Stored


class Pooling:
    """Sums hidden states of some chunks, which one forward computes, or several one after the other.

    Parameters
    ----------
    chunks
        In the order of the rows of each step.
    """

    def __init__(self, chunks: Sequence[PrefillChunk]) -> None:
        self._chunks = chunks
        self._sums: dict[int, Tensor] = {}

    def step(self, batch: Sequence[Stored]) -> Callable[[Tensor], None] | None:
        """A function that adds the hidden states of a step, if any of them are wanted.

        Parameters
        ----------
        batch
            The tokens that the step computes, chunk by chunk.
        """
        ranges: dict[int, tuple[int, int]] = {}
        at = 0
        for row, (chunk, one) in enumerate(zip(self._chunks, batch, strict=False)):
            if chunk.pooled_from is not None and chunk.pooled_from < one.length + one.queries:
                ranges[row] = at + max(0, chunk.pooled_from - one.length), at + one.queries
            at += one.queries

        def add_to_sums(hidden: Tensor) -> None:
            for row, sums in zip(ranges, summed(hidden, [*ranges.values()]), strict=True):
                self._sums[row] = self._sums[row] + sums if row in self._sums else sums

        return add_to_sums if ranges else None

    def results(self) -> list[Pooled | None]:
        """The sums of each chunk.

        Raises
        ------
        ModelError
            They are not finite.
        """
        found: list[Pooled | None] = []
        for row, chunk in enumerate(self._chunks):
            if chunk.pooled_from is None:
                found.append(None)
            else:
                (sums,) = as_bytes(self._sums[row][None])
                found.append(Pooled(chunk.pooled_from, chunk.stop, sums))
        return found
