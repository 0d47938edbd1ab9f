"""Finds earlier occurrences of the last tokens: an index of pairs of tokens in a text, and the longest match.

Prompt lookup (https://github.com/apoorvumang/prompt-lookup-decoding), like transformers' ``prompt_lookup_num_tokens``
and vLLM's ``ngram`` method. Those read the whole text in every step. Here the unchanging part is indexed once, and
questions on one document share its index.
"""

from __future__ import annotations

from typing import Any

import numpy as np

SHORTEST = 2
"""Tokens of the shortest match: a single word says little about the next."""
LONGEST = 16
"""Maximum length of a match: longer ones are hardly more reliable."""
NEAREST = 4096
"""Maximum occurrences of a pair that are compared, the last ones of each text: in tables, some are everywhere."""

Tokens = np.ndarray[Any, np.dtype[np.int32]]
Positions = np.ndarray[Any, np.dtype[np.int64]]


class PairIndex:
    """An index of where each pair of tokens ends in a part of a text; 12 bytes per token.

    Parameters
    ----------
    text
        The tokens; they are kept.
    start, stop
        The range of positions (of tokens after a pair) that are indexed.
    """

    def __init__(self, text: Tokens, start: int, stop: int) -> None:
        self.text = text[:stop]
        first = max(SHORTEST, start)
        pairs = _joined(text[first - 2 : stop - 2], text[first - 1 : stop - 1])
        order = np.argsort(pairs, kind="stable")
        self._pairs = pairs[order]
        self._positions = (order + first).astype(np.int32)

    def after(self, pair: Tokens) -> Positions:
        """Positions after a pair of tokens, the last :data:`NEAREST` of them, in order."""
        key = _joined(pair[:1], pair[1:])
        low, high = self._pairs.searchsorted(key, "left")[0], self._pairs.searchsorted(key, "right")[0]
        return self._positions[max(low, high - NEAREST) : high].astype(np.int64)


def scan(text: Tokens, start: int, stop: int) -> Positions:
    """Positions in ``[start, stop)`` after the pair that ``text`` ends with, as from an index."""
    first = max(SHORTEST, start)
    a, b = text[-2:]
    alike = (text[first - 2 : stop - 2] == a) & (text[first - 1 : stop - 1] == b)
    return np.flatnonzero(alike)[-NEAREST:] + first


def longest_match(text: Tokens, positions: Positions) -> tuple[int, int]:
    """The position with the longest match before it; of several, the last.

    Returns
    -------
    tuple
        The position, and the length of the match, at most :data:`LONGEST`; (0, 0) without positions.
    """
    if not len(positions):
        return 0, 0
    length = SHORTEST
    while length < min(LONGEST, len(text)):
        before = positions - 1 - length
        more = positions[(before >= 0) & (text[before] == text[-1 - length])]
        if not len(more):
            break
        positions, length = more, length + 1
    return int(positions[-1]), length


def _joined(first: Tokens, second: Tokens) -> Positions:
    """Pairs of tokens as numbers."""
    return (first.astype(np.int64) << 32) | second
