"""Parts of embeddings: sums of the hidden states of chunks' tokens, step by step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from torch import Tensor

from distkv_dask.gang import Pooled, PrefillChunk
from distkv_dask.worker.model.hidden_states import as_bytes, summed
from distkv_dask.worker.plan import Stored


class Pooling:
    """Sums hidden states of some chunks, which one forward computes, or several one after the other.

    Parameters
    ----------
    chunks
        In the order of the rows of each step; of different sequences.
    """

    def __init__(self, chunks: Sequence[PrefillChunk]) -> None:
        self._chunks = chunks
        self._sums: dict[int, Tensor] = {}
        """By sequence."""

    def step(self, batch: Sequence[Stored]) -> Callable[[Tensor], None] | None:
        """A function that adds the hidden states of a step, if any of them are wanted.

        Parameters
        ----------
        batch
            The tokens that the step computes, chunk by chunk.
        """
        ranges: dict[int, tuple[int, int]] = {}
        at = 0
        for chunk, one in zip(self._chunks, batch, strict=False):
            if chunk.pooled_from is not None and chunk.pooled_from < one.length + one.queries:
                ranges[chunk.sequence] = at + max(0, chunk.pooled_from - one.length), at + one.queries
            at += one.queries

        def add_to_sums(hidden: Tensor) -> None:
            self._add(zip(ranges, summed(hidden, [*ranges.values()]), strict=True))

        return add_to_sums if ranges else None

    def add(self, part: Pooling) -> None:
        """Add the sums of a part of the same chunks."""
        self._add(part._sums.items())

    def results(self) -> list[Pooled | None]:
        """The sums of each chunk.

        Raises
        ------
        ModelError
            They are not finite.
        """
        found: list[Pooled | None] = []
        for chunk in self._chunks:
            if chunk.pooled_from is None:
                found.append(None)
            else:
                (sums,) = as_bytes(self._sums[chunk.sequence][None])
                found.append(Pooled(chunk.pooled_from, chunk.stop, sums))
        return found

    def _add(self, sums: Iterable[tuple[int, Tensor]]) -> None:
        for sequence, some in sums:
            self._sums[sequence] = self._sums[sequence] + some if sequence in self._sums else some
