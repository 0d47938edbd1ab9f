"""States of recurrent layers at their home: of each sequence the committed one, and the one after what runs now.

A window or chunk that runs again begins with the state that it began with before: forwards never change a state that is
kept here. A length that no state is kept for is said to be so; it is never guessed.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from distkv_dask.errors import StateLostError

if TYPE_CHECKING:
    from distkv_dask.worker.model.recurrent import State

KEPT = 2
"""States of a sequence while something runs: the one that it began with, and the one that changes."""


class States:
    """States by sequence and the number of tokens that they are after.

    The home lane's thread reads and keeps them; any thread may drop those of a sequence that nothing computes on.
    """

    def __init__(self) -> None:
        self._kept: dict[int, dict[int, State]] = {}

    def begin(self, sequence: int, length: int, documents: Iterable[int] = ()) -> State:
        """State of a sequence after ``length`` tokens, of which nothing else is kept from now on.

        Parameters
        ----------
        sequence
            Its number.
        length
            Its tokens until now; a new one has an empty state.
        documents
            Documents that it begins with: one that ends there has the state.

        Raises
        ------
        StateLostError
            No such state is here.
        """
        if not length:
            self.drop(sequence)
            return {}
        state = self.kept(sequence, length, documents)
        self._kept[sequence] = {length: state}
        return state

    def kept(self, sequence: int, length: int, documents: Iterable[int] = ()) -> State:
        """State of a sequence, or of a document that it begins with, after ``length`` tokens.

        Raises
        ------
        StateLostError
            No such state is here.
        """
        for one in (sequence, *documents):
            if length in self._kept.get(one, ()):
                return self._kept[one][length]
        raise StateLostError(
            f"this worker has no state of sequence {sequence} after {length} tokens: it is recomputed from its first "
            "token",
            sequence,
        )

    def put(self, sequence: int, length: int, state: State) -> None:
        """Keep a state beside the one that a sequence began with."""
        self._kept.setdefault(sequence, {})[length] = state

    def drop(self, sequence: int) -> None:
        """Keep nothing of a sequence."""
        self._kept.pop(sequence, None)
