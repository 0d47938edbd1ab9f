"""The pool of a further stage: its home allocates blocks and names them in every batch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from distkv_dask.worker.blocks.pool import Pool


class NamedBlocks(Pool):
    """A pool in which blocks belong to the sequences of the batch that came last, and to no others."""

    def name_blocks(self, rows: Iterable[tuple[int, Iterable[tuple[int, int]], Sequence[int]]]) -> None:
        """Let sequences have these blocks, each with token ranges ``[start, stop)`` and their blocks, in order."""
        tables: dict[int, dict[int, int]] = {}
        for sequence, spans, blocks in rows:
            logical = [at for start, stop in spans for at in self._logical(start, stop)]
            tables.setdefault(sequence, {}).update(zip(logical, blocks, strict=False))
        with self._lock:
            self._tables = tables
