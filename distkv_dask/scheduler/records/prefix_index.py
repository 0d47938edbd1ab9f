"""Stored documents by prefix: an index of hash chains over whole blocks. Pure.

The hash of a block covers all tokens before it, too, and the adapter that they are computed with, so the longest common
prefix is found block by block. Callers compare tokens and adapters afterwards: a hash collision costs a comparison,
never a wrong answer.
"""

from __future__ import annotations

from array import array
from collections.abc import Collection, Iterator


class PrefixIndex:
    """Documents by their prefixes.

    Parameters
    ----------
    block_tokens
        Tokens in one block.

    Examples
    --------
    >>> index = PrefixIndex(2)
    >>> index.add(7, array("i", [1, 2, 3, 4, 5]), "")
    >>> index.find(array("i", [1, 2, 3, 9]), ""), index.find(array("i", [3, 4]), "")
    (7, None)
    """

    def __init__(self, block_tokens: int) -> None:
        self._size = block_tokens
        self._documents: dict[int, dict[int, None]] = {}

    def add(self, document: int, tokens: array[int], adapter: str) -> None:
        """Add a document."""
        for key in chain(tokens, self._size, adapter):
            self._documents.setdefault(key, {})[document] = None

    def drop(self, document: int, tokens: array[int], adapter: str) -> None:
        """Remove a document (no error if it is not there)."""
        for key in chain(tokens, self._size, adapter):
            if (documents := self._documents.get(key)) is not None:
                documents.pop(document, None)
                if not documents:
                    del self._documents[key]

    def __bool__(self) -> bool:
        """Whether there are any blocks of documents."""
        return bool(self._documents)

    def find(self, tokens: array[int], adapter: str) -> int | None:
        """The document with the most blocks in common with a prompt; of several, the one stored first."""
        return next(iter(self.longest(tokens, adapter)[0]), None)

    def longest(self, tokens: array[int], adapter: str) -> tuple[Collection[int], int]:
        """The documents with the most blocks in common with a prompt, and how many tokens that is."""
        found: Collection[int] = ()
        length = 0
        for blocks, key in enumerate(chain(tokens, self._size, adapter), 1):
            if key not in self._documents:
                break
            found, length = self._documents[key], blocks * self._size
        return found, length


def chain(tokens: array[int], block_tokens: int, adapter: str) -> Iterator[int]:
    """The hash of each whole block, which covers all tokens before it, too.

    Examples
    --------
    >>> tokens = array("i", [1, 2, 3])
    >>> [*chain(tokens, 1, "")] == [*chain(tokens, 1, "")], {*chain(tokens, 1, "")} & {*chain(tokens, 1, "other")}
    (True, set())
    """
    before = hash(adapter) if adapter else 0
    for at in range(0, len(tokens) // block_tokens * block_tokens, block_tokens):
        before = hash((before, tokens[at : at + block_tokens].tobytes()))
        yield before
