"""The work list of a batch on a GPU: which program attends to which tokens, and which partials are merged after that.

Rows are cut into pieces, so that one long row among short ones uses the whole card. The host writes the list once per
step; its size is the same in every step, so that buffers and launches are, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from .index import Ints
from .triton_tiles import Tiles

ITEM = 8
"""int32 of an item: queries of its row (0: no item), row of the block table, first query of the row, first packed row
of the tile, first token that the tile sees, token after the last, index of the last token that query 0 sees, and where
the result goes: query 0's token of out, or ``-1 - partial``."""
MIN_PIECE = 256
"""Pieces of a row have at least about this many tokens; merging smaller ones costs more than it saves."""
FEW_PROGRAMS = 4
"""Programs per processor for a batch of few queries per row; more than run at once, to balance the load."""
NO_LIMIT = 1 << 30
"""An index past every token."""


class Shape(NamedTuple):
    """The fixed sizes of a batch: queries of each row, heads of a group, kv heads, and the most tokens of a row."""

    queries: Sequence[int]
    group: int
    kv_heads: int
    room: int
    block_tokens: int
    value_dim: int


class Launch(NamedTuple):
    """One launch of the attention kernel: its rows, and where its items lie in the list.

    Rows are cut into pieces so that ``extra`` items are added at most. ``queries`` [tiles, 2] are a tile's first query
    and last one within its row.
    """

    tiles: Tiles
    rows: Ints
    row_tiles: Ints
    queries: Ints
    extra: int
    at: int
    items: int

    @property
    def tile_rows(self) -> Ints:
        """The index in ``rows`` of each tile."""
        return np.repeat(np.arange(len(self.rows)), self.row_tiles)

    @property
    def begins(self) -> Ints:
        """First tile of each row."""
        return np.cumsum(self.row_tiles) - self.row_tiles


class Sight(NamedTuple):
    """What the tiles of a launch see: tokens [low, high), counted in pieces from ``base`` on."""

    low: Ints
    high: Ints
    base: Ints


class WorkList:
    """Sizes of a batch's list, and the method that writes it.

    Parameters
    ----------
    shape
        The batch.
    tiles
        For rows of few queries, and of many.
    processors
        Of the card.

    Attributes
    ----------
    launches
        Launches of the attention kernel, at most one for each kind of tiles.
    partials
        Partials, each of one query and all heads, that the pieces of rows can need.
    tokens_at, entries_at, size
        Where in the list int32 [queries, 2] and int32 [partials, 2] of the merge kernel begin, and the list's length.
    """

    def __init__(self, shape: Shape, tiles: tuple[Tiles, Tiles], processors: int) -> None:
        self._shape = shape
        self._counts: Ints = np.array(shape.queries, np.int64)
        self._firsts: Ints = np.cumsum(self._counts) - self._counts
        packed = self._counts * shape.group
        few, many = tiles
        kinds = [(few, packed > 0, FEW_PROGRAMS)]
        if many != few:
            kinds = [(few, (packed > 0) & (packed <= few.rows), FEW_PROGRAMS), (many, packed > few.rows, 1)]
        self.launches: list[Launch] = []
        self.partials = at = 0
        for kind, chosen, programs in kinds:
            if chosen.any():
                launch = self._launch(kind, np.flatnonzero(chosen), programs * processors // shape.kv_heads, at)
                at += ITEM * launch.items
                self.partials += launch.extra * int((-(-self._counts[launch.rows] // launch.row_tiles)).max())
                self.launches.append(launch)
        self.tokens_at = at
        self.entries_at = aligned(at + 2 * int(self._counts.sum()))
        self.size = aligned(self.entries_at + 2 * self.partials)

    def _launch(self, tiles: Tiles, rows: Ints, wanted: int, at: int) -> Launch:
        row_tiles = -(-self._counts[rows] * self._shape.group // tiles.rows)
        least = int(row_tiles.sum())
        extra = min(wanted, least * (self._shape.room // MIN_PIECE))
        if self._shape.room < 2 * MIN_PIECE:
            extra = 0
        nth = np.arange(least) - np.repeat(np.cumsum(row_tiles) - row_tiles, row_tiles)
        last = np.repeat(self._counts[rows] - 1, row_tiles)
        group = self._shape.group
        queries = np.stack((nth * tiles.rows // group, np.minimum(((nth + 1) * tiles.rows - 1) // group, last)), 1)
        return Launch(tiles, rows, row_tiles, queries, extra, at, least + extra)

    def write(
        self, to: npt.NDArray[np.int32], lengths: Ints, starts: Ints | None, first_keys: Ints | None = None
    ) -> None:
        """Write the list of a step.

        Parameters
        ----------
        to
            int32 [size].
        lengths
            Visible tokens of each row.
        starts
            Query i of a row sees tokens up to its start + i; None: all.
        first_keys
            Each query of the batch sees tokens from here on; None: all.
        """
        to[: self.tokens_at] = 0
        tokens = to[self.tokens_at :][: 2 * int(self._counts.sum())].reshape(-1, 2)
        tokens[:] = 0, -1
        entries = to[self.entries_at :][: 2 * self.partials].reshape(-1, 2)
        starts = np.full(len(lengths), NO_LIMIT) if starts is None else np.clip(starts, -NO_LIMIT, NO_LIMIT)
        used = 0
        for launch in self.launches:
            sight = self._sight(launch, lengths, starts, first_keys)
            pieces, piece = self._cut(launch, np.maximum.reduceat(sight.high - sight.base, launch.begins))
            needed = np.where(pieces > 1, pieces * self._counts[launch.rows], 0)
            bases = used + np.cumsum(needed) - needed
            items = self._items(launch, sight, (starts[launch.rows], pieces, piece, bases))
            to[launch.at :][: items.size] = items.ravel()
            self._merges(launch.rows[pieces > 1], pieces[pieces > 1], bases[pieces > 1], tokens, entries)
            used += int(needed.sum())

    def _step(self, launch: Launch) -> int:
        """Pieces begin at multiples of it."""
        return max(launch.tiles.tokens, self._shape.block_tokens)

    def _sight(self, launch: Launch, lengths: Ints, starts: Ints, first_keys: Ints | None) -> Sight:
        rows = launch.rows[launch.tile_rows]
        high = np.clip(starts[rows] + launch.queries[:, 1] + 1, 0, lengths[rows])
        if first_keys is None:
            return Sight(np.zeros_like(high), high, np.zeros_like(high))
        row: Ints = np.repeat(np.arange(len(self._counts)), self._counts)
        ends = np.minimum(lengths[row], starts[row] + np.arange(len(row)) - self._firsts[row] + 1)
        firsts = np.append(np.where(first_keys < ends, np.maximum(first_keys, 0), NO_LIMIT), NO_LIMIT)
        edges = np.stack((launch.queries[:, 0], launch.queries[:, 1] + 1), 1) + self._firsts[rows][:, None]
        low = np.minimum.reduceat(firsts, edges.reshape(-1))[::2]  # without the queries between tiles
        low, high = (np.where(low < high, edge, 0) for edge in (low, high))
        step = self._step(launch)
        return Sight(low, high, low // step * step)

    def _cut(self, launch: Launch, span: Ints) -> tuple[Ints, Ints]:
        """Pieces of each row's tiles, and tokens of a piece: about the same for all rows that are long enough."""
        step = self._step(launch)
        pieces = np.ones_like(span)
        if launch.extra:
            share = -(-int((span * launch.row_tiles).sum()) // launch.extra)
            pieces = np.maximum(1, span // max(share, MIN_PIECE))
        piece = -(-span // (pieces * step)) * step
        return np.maximum(1, -(-span // np.maximum(piece, 1))), piece

    def _items(self, launch: Launch, sight: Sight, cut: tuple[Ints, Ints, Ints, Ints]) -> Ints:
        """Items [n, ITEM] of a launch, those that take longest first."""
        starts, pieces, piece, bases = cut
        counts, firsts = self._counts[launch.rows], self._firsts[launch.rows]
        programs = launch.row_tiles * pieces
        row = np.repeat(np.arange(len(programs)), programs)
        nth = np.arange(len(row)) - np.repeat(np.cumsum(programs) - programs, programs)
        part, tile = np.divmod(nth, launch.row_tiles[row])
        packed = tile * launch.tiles.rows
        tile += launch.begins[row]
        begin = sight.base[tile] + part * piece[row]
        low = np.maximum(begin, sight.low[tile])
        high = np.maximum(low, np.minimum(begin + piece[row], sight.high[tile]))
        to = np.where(pieces[row] > 1, -1 - bases[row] - part * counts[row], firsts[row])
        items = np.stack((counts[row], launch.rows[row], firsts[row], packed, low, high, starts[row], to), 1)
        return items[np.argsort(low - high, kind="stable")]

    def _merges(
        self, rows: Ints, pieces: Ints, bases: Ints, tokens: npt.NDArray[np.int32], entries: npt.NDArray[np.int32]
    ) -> None:
        """List the partials of each query of rows that were cut."""
        counts = self._counts[rows]
        row = np.repeat(np.arange(len(rows)), counts)
        query = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
        parts = pieces[row]
        begin = bases[0] + np.cumsum(parts) - parts if len(row) else parts
        tokens[self._firsts[rows][row] + query] = np.stack((begin, parts), 1)
        part = np.arange(int(parts.sum())) - np.repeat(np.cumsum(parts) - parts, parts)
        partial = np.repeat(bases[row] + query, parts) + part * np.repeat(counts[row], parts)
        if len(partial):
            d = self._shape.value_dim
            entries[bases[0] :][: len(partial)] = np.stack((partial * d, self.partials * d + partial), 1)


def aligned(at: int) -> int:
    """The next place whose address is a multiple of 16 bytes, as the compiled kernels expect."""
    return -(-at // 4) * 4
