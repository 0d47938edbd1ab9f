"""What only the home of a sequence has: states of recurrent layers, and KV of layers that see a window.

Both are kept as of the committed tokens until the running window or chunk has ended, so one that is repeated begins
with the same state. Snapshots are kept as well, after numbers of tokens that the gManager names: other sequences begin
with them.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from distkv_dask.worker.home.states import States
from distkv_dask.worker.home.windows import Windows

if TYPE_CHECKING:
    from distkv_dask.worker.model.loaded import LoadedModel
    from distkv_dask.worker.model.recurrent import Past, State


class Begun(NamedTuple):
    """A sequence in a running window or chunk, from ``length`` tokens to at most ``stop``."""

    sequence: int
    length: int
    stop: int


class Ended(NamedTuple):
    """A sequence after a window or chunk: its tokens, its recurrent state if any; whether it is a snapshot."""

    sequence: int
    length: int
    state: State | None
    snapshot: bool = False


@dataclass(slots=True)
class Change:
    """The states with which a window or chunk begins (the model's ``past``), and those ``after`` it, once set."""

    past: Past | None
    after: Iterable[Ended] = ()


class HomeState:
    """States and windows of the sequences that a worker is home of.

    Any thread may change snapshots, and sequences that nothing computes on; only the home lane's changes the rest. The
    gManager's latest message about a sequence's snapshots also applies to chunks that were planned before it.

    Parameters
    ----------
    windows
        KV of layers that see only a window, if the model has such.
    """

    def __init__(self, windows: Windows | None = None) -> None:
        self.states = States()
        self.windows = windows
        self._lock = threading.Lock()
        self._wanted: dict[int, frozenset[int]] = {}

    @contextmanager
    def change(self, model: LoadedModel, begun: Iterable[Begun]) -> Iterator[Change]:
        """Run a window or chunk on sequences; the states after it are kept unless it fails.

        Raises
        ------
        StateLostError
            The state that the sequence continues from is not here.
        """
        begun, past = list(begun), None
        if model.geometry.state_bytes:
            past = model.past([self.states.begin_run(one.sequence, one.length) for one in begun])
        if self.windows is not None:
            for one in begun:
                self.windows.begin_run(*one)
        change = Change(past)
        yield change
        for sequence, length, state, snapshot in change.after:
            self.put(sequence, length, state)
            with self._lock:
                if snapshot and length in self._wanted.get(sequence, {length}):
                    for part in self._parts(state is not None):
                        part.snapshot(sequence, length)

    def put(self, sequence: int, length: int, state: State | None) -> None:
        """Keep a sequence's state after ``length`` tokens, in addition to the one that it began with."""
        if state is not None:
            self.states.put(sequence, length, state)
        if self.windows is not None:
            self.windows.put(sequence, length)

    def adopt(self, sequence: int, source: int, length: int) -> None:
        """Let a sequence begin with this worker's state of another one after ``length`` tokens, if it has any."""
        with self._lock:
            for one in self._parts():
                one.adopt(sequence, source, length)

    def keep(self, sequence: int, lengths: Collection[int], ended: bool) -> None:
        """Keep only a sequence's snapshots after ``lengths`` tokens; if it has ``ended``, nothing else."""
        with self._lock:
            for one in self._parts():
                one.keep(sequence, lengths, ended)
            if ended:
                self._wanted.pop(sequence, None)
            else:
                self._wanted[sequence] = frozenset(lengths)

    def drop(self, sequence: int) -> None:
        """Keep nothing of a sequence."""
        self.keep(sequence, (), ended=True)

    def _parts(self, states: bool = True) -> list[States | Windows]:
        """States and windows, as far as the model has them."""
        return [*([self.states] if states else []), *([self.windows] if self.windows is not None else [])]

    def most_steps(self, steps: int | None) -> int | None:
        """Most steps of a decode window: ``steps``, or fewer if the blocks of windows have no room for them."""
        if self.windows is None:
            return steps
        return self.windows.steps if steps is None else min(self.windows.steps, steps)
