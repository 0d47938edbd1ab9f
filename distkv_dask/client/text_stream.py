"""The text of one answer, extended token by token as they arrive."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Protocol

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""What a tokenizer returns for the bytes of an incomplete character."""


class Decodes(Protocol):
    """A tokenizer."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens."""


class TextStream:
    """The text of one answer, extended token by token.

    It never returns half a character, or text that may be the start of a stop string.

    Parameters
    ----------
    tokenizer
        Decodes the tokens.
    stop
        The text ends before the first of these strings.
    """

    def __init__(self, tokenizer: Decodes, stop: Sequence[str] = ()) -> None:
        self.token_ids: list[int] = []
        """Tokens of the text, without those of a stop string."""
        self.text = ""
        """All text so far, including text that was not returned yet."""
        self.stopped = False
        """Whether a stop string ended the text."""
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._given = 0
        self._told = 0
        self._ends: list[int] = []  # length of the text after each token
        self._context = 0  # decoding starts at this token, so that spaces between tokens come out right ...
        self._decoded = 0  # ... and tokens from this one on are not in the text yet

    def add(self, tokens: Iterable[int]) -> str:
        """Add the next tokens; returns the text that is final. After a stop string, tokens are ignored."""
        for token in tokens:
            if self.stopped:
                break
            self.token_ids.append(token)
            piece = self._pending()
            if not piece.endswith(_UNFINISHED):
                self._grow(piece)
            self._ends.append(len(self.text))
            self._look_for_stop(len(piece))
        return self._give(self._safe_length())

    @property
    def told(self) -> int:
        """Number of tokens whose text was returned, up to the last one that has some."""
        while self._told < len(self._ends) and (self._ends[self._told - 1] if self._told else 0) < self._given:
            if self._ends[self._told] > self._given:
                break
            self._told += 1
        return self._told

    def finish(self) -> str:
        """End the text; returns the rest of it, with U+FFFD for incomplete characters."""
        if not self.stopped:
            piece = self._pending()
            self._grow(piece)
            if self._ends:
                self._ends[-1] = len(self.text)
            self._look_for_stop(len(piece))
        return self._give(len(self.text))

    def _pending(self) -> str:
        """Return the text of the tokens that are not in the text yet."""
        if self._decoded == len(self.token_ids):
            return ""
        before = self._tokenizer.decode(self.token_ids[self._context : self._decoded])
        return self._tokenizer.decode(self.token_ids[self._context :])[len(before) :]

    def _grow(self, piece: str) -> None:
        if piece:
            self.text += piece
            self._context, self._decoded = self._decoded, len(self.token_ids)

    def _look_for_stop(self, grown: int) -> None:
        found = [
            at
            for stop in self._stop
            if (at := self.text.find(stop, max(0, len(self.text) - grown - len(stop) + 1))) >= 0
        ]
        if found:
            self.stopped = True
            self.text = self.text[: min(found)]
            needed = sum(before < len(self.text) for before, _ in pairwise([0, *self._ends]))
            del self.token_ids[needed:]

    def _safe_length(self) -> int:
        """Length of the text in which no stop string can begin."""
        if self.stopped:
            return len(self.text)
        longest = 0
        for stop in self._stop:
            for length in range(min(len(stop) - 1, len(self.text)), longest, -1):
                if self.text.endswith(stop[:length]):
                    longest = length
                    break
        return len(self.text) - longest

    def _give(self, upto: int) -> str:
        piece = self.text[self._given : upto]
        self._given = max(self._given, upto)
        return piece
