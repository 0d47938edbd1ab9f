"""States of recurrent layers at their home: per sequence the committed one, and one after the running window or chunk.

A repeated window or chunk begins with the same state: forwards never change a state that is kept here. A missing state
is an error, never a guess. Snapshots are intermediate states, with which other sequences begin.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from distkv_dask.errors import StateLostError

if TYPE_CHECKING:
    from distkv_dask.worker.model.recurrent import State

KEPT = 2
"""States of a sequence in a running window or chunk: the one that it began with, and the one that changes."""


class States:
    """States by sequence and number of tokens.

    The home lane's thread reads and keeps them. Any thread may change snapshots, and drop the states of a sequence that
    nothing computes on.
    """

    def __init__(self) -> None:
        self._kept: dict[int, dict[int, State]] = {}
        self._snapshots: dict[int, dict[int, State]] = {}

    def begin_run(self, sequence: int, length: int) -> State:
        """State of a sequence after ``length`` tokens; from now on only it and snapshots are kept.

        Parameters
        ----------
        sequence
            Its number.
        length
            Its tokens until now; a new one has an empty state.

        Raises
        ------
        StateLostError
            This worker has no such state.
        """
        if not length:
            self._kept.pop(sequence, None)
            return {}
        state = self.kept(sequence, length)
        self._kept[sequence] = {length: state}
        return state

    def kept(self, sequence: int, length: int) -> State:
        """State of a sequence after ``length`` tokens.

        Raises
        ------
        StateLostError
            This worker has no such state.
        """
        if length in self._kept.get(sequence, ()):
            return self._kept[sequence][length]
        raise StateLostError(
            f"this worker has no state of sequence {sequence} after {length} tokens: it is recomputed from its first "
            "token",
            sequence,
        )

    def put(self, sequence: int, length: int, state: State) -> None:
        """Keep a state in addition to the one that a sequence began with."""
        self._kept.setdefault(sequence, {})[length] = state

    def snapshot(self, sequence: int, length: int) -> None:
        """Keep the state after ``length`` tokens until :meth:`keep` drops it."""
        self._snapshots.setdefault(sequence, {})[length] = self.kept(sequence, length)

    def adopt(self, sequence: int, source: int, length: int) -> None:
        """Let a sequence begin with the state of another after ``length`` tokens, if that is here."""
        for states in (self._snapshots, self._kept):
            if length in states.get(source, ()):
                self._kept[sequence] = {length: states[source][length]}

    def keep(self, sequence: int, lengths: Collection[int], ended: bool) -> None:
        """Keep only a sequence's snapshots after ``lengths`` tokens; if it has ``ended``, nothing else."""
        kept = {at: one for at, one in self._snapshots.pop(sequence, {}).items() if at in lengths}
        if kept:
            self._snapshots[sequence] = kept
        if ended:
            self._kept.pop(sequence, None)

    def sequences(self) -> set[int]:
        """Sequences with any kept state."""
        return {*self._kept, *self._snapshots}

    def drop(self, sequence: int) -> None:
        """Keep nothing of a sequence."""
        self.keep(sequence, (), ended=True)
