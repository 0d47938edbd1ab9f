"""Where the KV of a sequence is: spans of its tokens on workers, and moves of them.

Units: positions and lengths are tokens, times are seconds, memory is bytes. A worker is named by its Dask address.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Span:
    """Contiguous token range ``[start, stop)`` of a sequence held by one worker (its reserved room, filled or not).

    The blocks of a span that names a ``document`` belong to that sequence, not to the one whose placement has it:
    they are only read.
    """

    worker: str
    start: int
    stop: int
    document: int | None = None

    @property
    def tokens(self) -> int:
        """Number of tokens that the span has room for."""
        return self.stop - self.start

    def filled(self, length: int) -> int:
        """Number of this span's tokens below sequence length ``length``."""
        return max(0, min(length, self.stop) - self.start)


Placement = tuple[Span, ...]
"""Ordered, gapless spans of one sequence, from token 0; adjacent spans are on different workers.

A worker may hold several spans; borders between spans are multiples of the block's tokens. Only the last span grows:
its worker is the sequence's home. Spans that it shares with documents come first.
"""


@dataclass(frozen=True, slots=True)
class Move:
    """Tokens ``[start, stop)`` of a sequence, whole blocks of one span of ``source``, go to ``target``."""

    sequence: int
    start: int
    stop: int
    source: str
    target: str

    @property
    def tokens(self) -> int:
        """Number of tokens that move."""
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a worker's holder lane listens for channels.

    ``port`` is for TCP; ``unix`` names its Unix socket, if it has one; ``ucx`` is its port for UCX, or 0.
    """

    worker: str
    host: str
    port: int
    unix: str = ""
    ucx: int = 0


@dataclass(frozen=True, slots=True)
class Stage:
    """A run of a model's layers, ``number`` of ``count``, that one worker computes.

    The home of all sequences has the first one. It is told where the ``further`` stages listen, and how many ``blocks``
    all of them have room for.

    Examples
    --------
    >>> [Stage(number, 3).layers(8) for number in range(3)]
    [(0, 2), (2, 5), (5, 8)]
    """

    number: int
    count: int
    further: tuple[Endpoint, ...] = ()
    blocks: int = 0

    def layers(self, of: int) -> tuple[int, int]:
        """First layer of the stage, and the one after its last, by the number of layers: the home has the fewest."""
        return self.number * of // self.count, (self.number + 1) * of // self.count
