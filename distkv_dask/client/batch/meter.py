"""How much of a batch is left, by tokens: rows take as long as they have tokens, so counting rows would mislead.

Tokens of requests in flight are known. Those of unread rows are estimated from the rows before them, by the sizes of
files if there are any.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from time import monotonic

from distkv_dask.client.batch.runner import Flying, Outcome


class Meter:
    """The work of a batch, in prompt tokens that take the same time.

    Parameters
    ----------
    total
        Rows, times questions, that this run has to answer; None if that is not known.
    sizes
        Bytes of rows by their labels, where they are known before the rows are read.
    new
        How many prompt tokens take as long as one token of an answer.
    """

    def __init__(self, total: int | None, sizes: Mapping[int | str, int], new: float) -> None:
        self._began = monotonic()
        self._new = new
        self._sizes = sizes
        self._mean = sum(sizes.values()) / len(sizes) if sizes else 1.0
        self._total = None if total is None else total * self._mean
        self._ended = 0.0
        self._done = 0.0

    def add(self, outcomes: Iterable[Outcome]) -> None:
        """Rows have been answered."""
        for one in outcomes:
            self._ended += self._size(one.row.label)
            if (answer := one.answer) is not None:
                self._done += self._work(answer.prompt_tokens - answer.reused_tokens, answer.new_tokens)

    def left(self, flying: Iterable[Flying], seconds: float | None = None) -> float | None:
        """Seconds until the end; None while nothing is known.

        Parameters
        ----------
        flying
            Requests that have not ended.
        seconds
            Since the run began; None looks at the clock.
        """
        asked = list(flying)
        if not self._done or self._total is None:
            return None
        begun = sum(self._work(prompt, new) for _, prompt, new in asked)
        read = self._ended + sum(self._size(label) for label, _, _ in asked)
        unread = max(0.0, self._total - read) * (self._done + begun) / read
        gone = monotonic() - self._began if seconds is None else seconds
        return gone * (begun + unread) / self._done

    def _work(self, prompt: float, new: float) -> float:
        return prompt + self._new * new

    def _size(self, label: int | str) -> float:
        return self._sizes.get(label, self._mean)
