"""Which stored document begins like a prompt: an index of hash chains over whole blocks. Pure.

The hash of a block covers all tokens before it, too, so the longest common beginning is found block by block. Whoever
asks compares tokens afterwards: two beginnings of one hash cost a comparison, never a wrong answer.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator


class PrefixIndex:
    """Documents by their beginnings.

    Parameters
    ----------
    block_tokens
        Tokens in one block.

    Examples
    --------
    >>> index = PrefixIndex(2)
    >>> index.add(7, array("i", [1, 2, 3, 4, 5]))
    >>> index.find(array("i", [1, 2, 3, 9])), index.find(array("i", [3, 4]))
    (7, None)
    """

    def __init__(self, block_tokens: int) -> None:
        self._size = block_tokens
        self._documents: dict[int, dict[int, None]] = {}

    def add(self, document: int, tokens: array[int]) -> None:
        """A document is stored."""
        for key in self._chain(tokens):
            self._documents.setdefault(key, {})[document] = None

    def drop(self, document: int, tokens: array[int]) -> None:
        """A document is stored no more (no error if it was not)."""
        for key in self._chain(tokens):
            if (documents := self._documents.get(key)) is not None:
                documents.pop(document, None)
                if not documents:
                    del self._documents[key]

    def find(self, tokens: array[int]) -> int | None:
        """The document, of those that have most blocks in common with a prompt, that was stored first."""
        found = None
        for key in self._chain(tokens):
            if key not in self._documents:
                break
            found = next(iter(self._documents[key]))
        return found

    def _chain(self, tokens: array[int]) -> Iterator[int]:
        before = 0
        for at in range(0, len(tokens) // self._size * self._size, self._size):
            before = hash((before, tokens[at : at + self._size].tobytes()))
            yield before
