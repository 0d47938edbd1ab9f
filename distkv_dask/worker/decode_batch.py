"""The sequences of one home: they join between windows, and each window decodes those that are ready."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from distkv_dask.adapter import Adapter, adapter_key
from distkv_dask.errors import GangAbortedError
from distkv_dask.gang import DecodeWindow, Gang, SequenceState, WindowResult
from distkv_dask.messages.names import EngineSpec
from distkv_dask.placement import Endpoint, Placement
from distkv_dask.sampling import SamplingParams

if TYPE_CHECKING:
    from distkv_dask.worker.model.loaded import LoadedModel


class DecodeBatch:
    """Committed state of each sequence, and the holders that it needs. Any thread may change it.

    Parameters
    ----------
    spec
        The largest batch of a window, and whether holders are known when it is submitted.
    model
        Has the compiled schemas; None on a memory worker, which decodes nothing.
    """

    def __init__(self, spec: EngineSpec, model: LoadedModel | None) -> None:
        self._spec = spec
        self._model = model
        self._lock = threading.Lock()
        self._epoch = 0
        self._decoded_until = 0.0
        self._states: dict[int, SequenceState] = {}
        self._holders: dict[int, tuple[Endpoint, ...]] = {}

    def join(self, state: SequenceState, holders: tuple[Endpoint, ...]) -> None:
        """Decode a sequence from the next window on."""
        with self._lock:
            self._states[state.sequence] = state
            self._holders[state.sequence] = holders

    def leave(self, sequence: int) -> None:
        """Stop decoding a sequence, from the next window on."""
        with self._lock:
            self._states.pop(sequence, None)
            self._holders.pop(sequence, None)

    def relocate(self, sequence: int, placement: Placement, holders: tuple[Endpoint, ...]) -> None:
        """Decode a sequence with another placement from the next window on."""
        with self._lock:
            if sequence in self._states:
                self._states[sequence] = replace(self._states[sequence], placement=placement)
                self._holders[sequence] = holders

    def reset(self, epoch: int) -> None:
        """Remove all sequences; windows of an older epoch, running ones included, commit nothing."""
        with self._lock:
            self._epoch = epoch
            self._decoded_until = 0.0
            self._states.clear()
            self._holders.clear()

    def needs(self) -> list[tuple[SamplingParams, Adapter | None]]:
        """Sampling parameters and adapters of the sequences that the next window may take."""
        with self._lock:
            return [(state.sampling, state.adapter) for state in self._within_limit(self._states.values())]

    def _within_limit(self, states: Iterable[SequenceState]) -> Iterator[SequenceState]:
        """The sequences with as many adapters as may be in memory: those of the first ones; others wait."""
        adapters: set[Adapter] = set()
        for state in states:
            if state.adapter is not None:
                if len(adapters | {state.adapter}) > self._spec.config.adapters:
                    continue
                adapters.add(state.adapter)
            yield state

    def of_window(self, window: DecodeWindow) -> tuple[list[SequenceState], tuple[Endpoint, ...]]:
        """The sequences that a window takes, and their holders; none if the window is of an older epoch."""
        with self._lock:
            if window.gang.epoch != self._epoch:
                return [], ()
            within = self._within_limit(self._states.values())
            ready = [state for state in within if self._may_join(state, window.gang)]
            batch = sorted(ready[: self._spec.config.window_batch], key=lambda one: adapter_key(one.adapter))
            holders = {one.worker: one for state in batch for one in self._holders[state.sequence]}
            return batch, tuple(holders.values())

    def _may_join(self, state: SequenceState, gang: Gang) -> bool:
        """Whether a gang has all holders of a sequence, its schema is compiled and its adapter in memory.

        With few tasks per gang, the gManager adds holders later.
        """
        assert self._model is not None
        if not self._model.is_prepared(state.sampling, state.adapter):
            return False
        return self._spec.config.granularity == "window" or {*self._holders[state.sequence]} <= {*gang.holders}

    def gap(self) -> float:
        """Seconds since the last window ended, if there were sequences to decode all the time; else 0."""
        return time.perf_counter() - self._decoded_until if self._decoded_until else 0.0

    def commit(self, window: DecodeWindow, batch: list[SequenceState], result: WindowResult) -> None:
        """Commit a window's tokens.

        Raises
        ------
        GangAbortedError
            The window is of an older epoch.
        """
        with self._lock:
            if window.gang.epoch != self._epoch:
                raise GangAbortedError(f"window {window.gang.name} was superseded by a newer placement")
            for state in batch:
                self._advance(state, result)
            self._decoded_until = time.perf_counter() if self._states else 0.0

    def _advance(self, state: SequenceState, result: WindowResult) -> None:
        """Commit a window's tokens to one sequence of the batch, unless it has left in between."""
        tokens = result.tokens.get(state.sequence, [])
        present = self._states.get(state.sequence)  # perhaps relocated
        if present is None:
            return
        if state.sequence in result.finished:
            del self._states[state.sequence]
            self._holders.pop(state.sequence, None)
            return
        self._states[state.sequence] = replace(
            present,
            length=state.length + len(tokens),
            last_token=tokens[-1],
            remaining=state.remaining - len(tokens),
            generated=(*state.generated, *tokens),
        )
