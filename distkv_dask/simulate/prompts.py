"""Prompts known only by length and shared blocks: arrays that make their tokens when read."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from itertools import chain
from typing import TYPE_CHECKING, SupportsIndex, overload

BLOCK = 512
"""Number of tokens for which one id of a trace stands (Mooncake's ``hash_ids``)."""


if TYPE_CHECKING:
    Tokens = array[int]
else:
    Tokens = array  # has no index at run time before Python 3.12


class Prompt(Tokens):
    """Token ids of a prompt of ``length`` tokens, which are made when they are read and not stored.

    Parameters
    ----------
    length
        Tokens.
    blocks
        One id for each :data:`BLOCK` tokens: prompts whose first ids agree begin alike. Tokens without an id are 0.

    Examples
    --------
    >>> prompt = Prompt(1000, (3, 7))
    >>> len(prompt), prompt[510:514], prompt[:700] == Prompt(700, (3, 7))
    (1000, array('i', [3, 3, 7, 7]), True)
    """

    _length: int
    _blocks: tuple[int, ...]

    def __new__(cls, length: int, blocks: tuple[int, ...] = ()) -> Prompt:
        """An empty array with a length of ``length`` tokens."""
        self: Prompt = super().__new__(cls, "i")  # type: ignore[assignment]
        self._length, self._blocks = length, blocks
        return self

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[int]:
        return iter(self._made(0, self._length))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, array) and len(self) == len(other) and self[0:] == other[0:]

    def __ne__(self, other: object) -> bool:
        return not self == other

    @overload
    def __getitem__(self, at: SupportsIndex) -> int: ...

    @overload
    def __getitem__(self, at: slice) -> array[int]: ...

    def __getitem__(self, at: SupportsIndex | slice) -> int | array[int]:
        if not isinstance(at, slice):
            return self._made(int(at), int(at) + 1)[0]
        start, stop, _ = at.indices(self._length)
        if at.start is None:
            return Prompt(stop, self._blocks)
        return self._made(start, stop)

    def __add__(self, other: array[int]) -> array[int]:
        return self._made(0, self._length) + other if other else self

    def _made(self, start: int, stop: int) -> array[int]:
        """Tokens ``[start, stop)`` as a plain array."""
        if not self._blocks:
            return array("i", bytes(4 * max(0, stop - start)))
        first, last = start // BLOCK, -(-stop // BLOCK)
        ids = (self._blocks[block] if block < len(self._blocks) else 0 for block in range(first, last))
        whole = array("i", chain.from_iterable((number,) * BLOCK for number in ids))
        return whole[start - first * BLOCK : stop - first * BLOCK]
