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
        for key in chain(tokens, self._size):
            self._documents.setdefault(key, {})[document] = None

    def drop(self, document: int, tokens: array[int]) -> None:
        """A document is stored no more (no error if it was not)."""
        for key in chain(tokens, self._size):
            if (documents := self._documents.get(key)) is not None:
                documents.pop(document, None)
                if not documents:
                    del self._documents[key]

    def find(self, tokens: array[int]) -> int | None:
        """The document, of those that have most blocks in common with a prompt, that was stored first."""
        found = None
        for key in chain(tokens, self._size):
            if key not in self._documents:
                break
            found = next(iter(self._documents[key]))
        return found


def chain(tokens: array[int], block_tokens: int) -> Iterator[int]:
    """The hash of each whole block, which covers all tokens before it, too."""
    before = 0
    for at in range(0, len(tokens) // block_tokens * block_tokens, block_tokens):
        before = hash((before, tokens[at : at + block_tokens].tobytes()))
        yield before
