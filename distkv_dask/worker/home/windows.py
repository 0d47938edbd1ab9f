"""KV of layers that see only a window, at the home of its sequence: blocks are freed as they leave the window.

The pool, rows and kernels are those of distributed layers; only placements differ: they name one worker and begin where
the window does. As with states of recurrent layers (:mod:`~distkv_dask.worker.home.states`), a repeated decode window
or chunk begins with the same KV, and missing KV is an error.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import count

from distkv_dask.config import Config
from distkv_dask.errors import StateLostError
from distkv_dask.geometry import Geometry
from distkv_dask.placement import Span
from distkv_dask.worker.blocks.pool import BlockShape, Pool
from distkv_dask.worker.device import HOST, Device
from distkv_dask.worker.plan import Stored

_EVERYTHING = 1 << 60
_STEPS = 64
"""Steps of a decode window for which there is always room, even if the layers' window is shorter."""


def blocks_per_sequence(geometry: Geometry, block_tokens: int, chunk_tokens: int) -> int:
    """Blocks of an idle sequence: its windows after the last commit and after the window or chunk since then.

    Parameters
    ----------
    geometry
        The model.
    block_tokens
        Tokens of a block.
    chunk_tokens
        Tokens of the largest prompt chunk.
    """
    return 3 + -(-(geometry.window + steps_at_once(geometry, chunk_tokens)) // block_tokens)


def steps_at_once(geometry: Geometry, chunk_tokens: int) -> int:
    """Steps that a decode window has at most, so that a sequence fits its blocks without a commit."""
    return min(max(geometry.window, _STEPS), chunk_tokens)


class Windows:
    """Blocks of the sequences that a worker is home of, for the layers of a model that see only a window.

    Any thread may change snapshots, and drop a sequence that nothing computes on; only the home lane's does the rest.
    Snapshots, and sequences that begin with one, share blocks: whole ones, which are never changed.

    Parameters
    ----------
    geometry
        The model.
    pool
        Memory for :func:`blocks_per_sequence` blocks of each sequence, and for a prompt chunk.
    home
        This worker.
    chunk_tokens
        Tokens of the largest prompt chunk.
    """

    def __init__(self, geometry: Geometry, pool: Pool, home: str, chunk_tokens: int) -> None:
        self.pool = pool
        self.steps = steps_at_once(geometry, chunk_tokens)
        """Steps that a decode window has at most."""
        self.chunk_tokens = chunk_tokens
        """Tokens of the largest prompt chunk."""
        self.sequences = pool.capacity_blocks // blocks_per_sequence(geometry, pool.block_tokens, chunk_tokens)
        """Sequences for which there is room."""
        self._home = home
        self._kinds = set(pool.layer_kinds)
        self._lengths: dict[int, set[int]] = {}
        self._spans: dict[int, Span] = {}
        self._snapshots: dict[int, dict[int, int]] = {}
        self._numbers = count(1)

    def begin_run(self, sequence: int, length: int, stop: int) -> None:
        """Make room for tokens ``[length, stop)`` of a sequence; blocks that none of them sees are freed.

        Parameters
        ----------
        sequence
            Its number.
        length
            Its tokens until now.
        stop
            Maximum number of its tokens after the window or chunk.

        Raises
        ------
        StateLostError
            This worker lacks KV that its next token sees.
        """
        pool, first = self.pool, self.first(length)
        if not length:
            pool.release_sequence(sequence)
        else:
            self.kept(sequence, length)
        pool.free(sequence, 0, first)
        pool.free(sequence, self._end(stop), _EVERYTHING)
        pool.reserve(sequence, first, stop)
        self._lengths[sequence] = {length}
        self._spans[sequence] = Span(self._home, first, stop)

    def put(self, sequence: int, length: int) -> None:
        """Keep a sequence's window after ``length`` tokens, in addition to the one that it began with."""
        pool, lengths = self.pool, self._lengths.setdefault(sequence, set())
        pool.free(sequence, self._end(max(lengths, default=0)), self.first(length))
        pool.free(sequence, self._end(length), _EVERYTHING)
        pool.reserve(sequence, self.first(length), length)
        lengths.add(length)

    def snapshot(self, sequence: int, length: int) -> None:
        """Keep a sequence's window after ``length`` tokens, in whole blocks, until :meth:`keep` drops it."""
        kept = self._snapshots.setdefault(sequence, {})
        if length not in kept:
            kept[length] = number = -next(self._numbers)
            self.pool.share(sequence, number, self.kept(sequence, length), length)

    def adopt(self, sequence: int, source: int, length: int) -> None:
        """Let a sequence begin with the window of another one after ``length`` tokens, if this worker has it."""
        number = self._snapshots.get(source, {}).get(length)
        if number is None and length in self._lengths.get(source, ()):
            number = source
        if number is not None:
            self.pool.release_sequence(sequence)
            self.pool.share(number, sequence, self.first(length), length)
            self._lengths[sequence] = {length}

    def keep(self, sequence: int, lengths: Collection[int], ended: bool) -> None:
        """Keep only a sequence's snapshots after ``lengths`` tokens; if it has ``ended``, nothing else."""
        kept = self._snapshots.pop(sequence, {})
        for length in kept.keys() - lengths:
            self.pool.release_sequence(kept.pop(length))
        if kept:
            self._snapshots[sequence] = kept
        if ended:
            self._lengths.pop(sequence, None)
            self._spans.pop(sequence, None)
            self.pool.release_sequence(sequence)

    def drop(self, sequence: int) -> None:
        """Keep nothing of a sequence."""
        self.keep(sequence, (), ended=True)

    def stored(self, batch: Sequence[Stored]) -> list[Stored]:
        """Sequences of a step, with their places here."""
        return [one._replace(placement=(self._spans[one.sequence],)) for one in batch]

    def kept(self, sequence: int, length: int) -> int:
        """Where the first block of a sequence's window after ``length`` tokens begins.

        Raises
        ------
        StateLostError
            This worker does not have it.
        """
        if length not in self._lengths.get(sequence, ()):
            raise StateLostError(
                f"this worker does not have what windows see of sequence {sequence} after {length} tokens: it is "
                "recomputed from its first token",
                sequence,
            )
        return self.first(length)

    def first(self, length: int) -> int:
        """Where the first block begins that the token at ``length`` sees."""
        seen: int = min(kind.first(length) for kind in self._kinds)
        return max(0, seen) // self.pool.block_tokens * self.pool.block_tokens

    def _end(self, length: int) -> int:
        """Where the block of the last of ``length`` tokens ends."""
        return -(-length // self.pool.block_tokens) * self.pool.block_tokens


def blocks_per_chunk(block_tokens: int, chunk_tokens: int) -> int:
    """Further blocks that the prompt chunk under way takes."""
    return 1 + -(-chunk_tokens // block_tokens)


def new_windows(geometry: Geometry, config: Config, home: str, sequences: int, device: Device = HOST) -> Windows:
    """Memory for the windows of ``sequences`` sequences, whose home is this worker."""
    size, chunk = config.block_tokens, config.prefill_chunk_tokens
    blocks = sequences * blocks_per_sequence(geometry, size, chunk) + blocks_per_chunk(size, chunk)
    pool = Pool(BlockShape.of(geometry, size, geometry.home_layers), blocks, device)
    return Windows(geometry, pool, home, chunk)
