"""Proposals for one sequence, from its prompt, a shared document and its answer so far."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from distkv_dask.worker.speculation.ngrams import SHORTEST, PairIndex, Tokens, longest_match, scan

KEPT_TOKENS = 1 << 22
"""Maximum tokens of documents with cached indices, 16 bytes each."""


class DocumentIndices:
    """Indices of recently used documents by number."""

    def __init__(self) -> None:
        self._kept: OrderedDict[int, PairIndex] = OrderedDict()

    def of(self, document: int, text: Tokens) -> PairIndex:
        """The index of a document, created if there is none of this text."""
        index = self._kept.pop(document, None)
        if index is None or not np.array_equal(index.text, text):
            index = PairIndex(text.copy(), 0, len(text))
        self._kept[document] = index
        while len(self._kept) > 1 and sum(len(one.text) for one in self._kept.values()) > KEPT_TOKENS:
            self._kept.popitem(last=False)
        return index


class Proposer:
    """Tokens of one sequence, and proposals from earlier occurrences of the last ones.

    Parameters
    ----------
    prompt
        Its tokens.
    document
        Index of the document that the prompt begins with, if it does.
    """

    def __init__(self, prompt: Tokens, document: PairIndex | None = None) -> None:
        shared = 0 if document is None else len(document.text)
        self._indices = [*([] if document is None else [document]), PairIndex(prompt, shared, len(prompt))]
        self._text = prompt
        self._prompt = self.length = len(prompt)
        """Tokens of the prompt and the answer so far."""

    @property
    def text(self) -> Tokens:
        """All tokens so far."""
        return self._text[: self.length]

    @property
    def answer(self) -> Tokens:
        """Tokens of the answer so far."""
        return self._text[self._prompt : self.length]

    def add_tokens(self, tokens: Sequence[int]) -> None:
        """Add tokens of the answer."""
        stop = self.length + len(tokens)
        if stop > len(self._text):
            grown = np.empty(max(2 * stop - self._prompt, self._prompt + 64), np.int32)
            grown[: self.length] = self._text[: self.length]
            self._text = grown
        self._text[self.length : stop] = tokens
        self.length = stop

    def propose(self, most: int) -> tuple[list[int], int]:
        """Up to ``most`` proposed tokens, and the length of the match before them; 0 without a match.

        The tokens after the longest match (of several, the last) are proposed. At the end of the text they repeat.
        """
        text = self.text
        if most < 1 or len(text) <= SHORTEST:
            return [], 0
        found = [index.after(text[-2:]) for index in self._indices]
        found.append(scan(text, self._prompt, self.length))
        position, length = longest_match(text, np.concatenate(found))
        if not length:
            return [], 0
        return np.resize(text[position : position + most], most).tolist(), length
