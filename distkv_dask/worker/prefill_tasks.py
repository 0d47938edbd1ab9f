"""The tasks of prompts' chunks on one worker: short chunks that wait for the home lane are computed in one forward.

A forward over few tokens takes nearly as long as one over many, since it reads all weights. So the lane computes the
next chunk together with queued ones that need no other holders than it does, up to a chunk's number of tokens: many
questions on one document, for instance. Holders are asked in the gang of the first, and those of the other gangs learn
that they are not needed. Each chunk keeps its own task and gang, and fails alone.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from distkv_dask.errors import GangAbortedError, in_words
from distkv_dask.gang import ChunkResult, PrefillChunk
from distkv_dask.messages import from_worker as did
from distkv_dask.sampling import FinishReason
from distkv_dask.worker.dask_metrics import computing, metered

if TYPE_CHECKING:
    from distkv_dask.worker.engine import WorkerEngine


@dataclass(eq=False, slots=True)
class Waiting:
    """A chunk with a task that waits for the lane; its result, once computed, and its time by activity."""

    chunk: PrefillChunk
    parts: dict[str, float] = field(default_factory=dict)
    tokens: int | None = None
    error: Exception | None = None


class PrefillTasks:
    """An open engine's tasks of chunks.

    Parameters
    ----------
    engine
        The engine on this worker.
    """

    def __init__(self, engine: WorkerEngine) -> None:
        self._engine = engine
        self._lock = threading.Lock()
        self._waiting: list[Waiting] = []

    def prefill(self, chunk: PrefillChunk) -> int:
        """Compute a chunk on the home lane, and commit it."""
        engine = self._engine
        try:
            self.prepare(chunk)
            with metered() as parts:
                one = Waiting(chunk, parts)
                with self._lock:
                    self._waiting.append(one)
                try:
                    return engine.lanes.home.submit(self._turn, one).result()
                finally:
                    self._remove_waiting([one])
        except Exception as error:
            engine.fail(chunk.gang, error)
            raise

    def prepare(self, chunk: PrefillChunk) -> None:
        """Read the adapter, and compile the schema for a last chunk, outside the lane: others do not wait for it."""
        if self._engine.model is not None:
            self._engine.model.prepare(chunk.sampling, chunk.adapter)

    def run(self, chunk: PrefillChunk, parts: dict[str, float]) -> int:
        """On the home lane: compute a chunk and tell the gManager; returns the number of its tokens."""
        self._report_start(chunk)
        runtime = self._engine.runtime
        with computing(parts, lambda: runtime.exchanged):
            result = runtime.prefill(chunk)
        self._tell_done(chunk, result)
        return len(chunk.tokens)

    # On the home lane

    def _turn(self, one: Waiting) -> int:
        """Compute a chunk, unless it was computed with an earlier one."""
        if one.tokens is None and one.error is None:
            together = self._together(one)
            if len(together) == 1 or not self._run_together(together):
                for each in together:
                    self._run_alone(each)
        if one.error is not None:
            raise one.error
        assert one.tokens is not None
        return one.tokens

    def _together(self, first: Waiting) -> list[Waiting]:
        """A chunk, and queued ones that fit into the same forward; they are removed from the queue."""
        with self._lock:
            chosen, room = [first], self._engine.spec.config.prefill_chunk_tokens - len(first.chunk.tokens)
            adapter = first.chunk.adapter
            if self._is_joined(first.chunk):
                for other in self._waiting:
                    fits = other is not first and len(other.chunk.tokens) <= room and self._is_joined(other.chunk)
                    alike = fits and other.chunk.adapter in (None, adapter)
                    if alike and {*other.chunk.gang.holders} <= {*first.chunk.gang.holders}:
                        chosen.append(other)
                        room -= len(other.chunk.tokens)
        self._remove_waiting(chosen)
        return chosen

    def _remove_waiting(self, some: Sequence[Waiting]) -> None:
        with self._lock:
            self._waiting = [one for one in self._waiting if one not in some]

    def _is_joined(self, chunk: PrefillChunk) -> bool:
        """Whether a chunk may be computed with others: all of its KV stays here, and it has no recurrent state.

        It must not follow others that may be under way, and not all of its tokens may be scored, because their logits
        take much memory.
        """
        assert self._engine.model is not None
        if chunk.gang.follows or chunk.targets or self._engine.model.geometry.state_bytes:
            return False
        here = (span for span in chunk.placement if span.worker == self._engine.worker)
        return any(span.start <= chunk.start and chunk.reach <= span.stop for span in here)

    def _run_together(self, some: Sequence[Waiting]) -> bool:
        """Compute chunks in one forward; False if that failed: then each is computed alone, to find the cause.

        The first one, if it has holders, has to be planned again, because its gang has failed for them.
        """
        runtime, ready = self._engine.runtime, []
        for one in some:
            try:
                self._report_start(one.chunk)
                ready.append(one)
            except GangAbortedError as error:
                one.error = error
        if not ready:
            return True
        parts: dict[str, float] = {}
        try:
            with computing(parts, lambda: runtime.exchanged):
                results = runtime.prefill_together([one.chunk for one in ready])
        except Exception as error:
            if (first := ready[0]).chunk.gang.holders:
                name = first.chunk.gang.name
                first.error = GangAbortedError(f"{name} failed together with others: {in_words(error)}")
            return False
        total = sum(len(one.chunk.tokens) for one in ready)
        for one, result in zip(ready, results, strict=True):
            one.tokens = len(one.chunk.tokens)
            one.parts.update({label: seconds * one.tokens / total for label, seconds in parts.items()})
            self._tell_done(one.chunk, result, joined=one is not ready[0])
        return True

    def _run_alone(self, one: Waiting) -> None:
        if one.error is None:
            try:
                one.tokens = self.run(one.chunk, one.parts)
            except Exception as error:
                one.error = error

    def _report_start(self, chunk: PrefillChunk) -> None:
        """Report the start of a chunk; raises GangAbortedError if it must not start."""
        engine = self._engine
        engine.check(chunk.gang)
        if engine.is_retired(chunk.sequence):
            raise GangAbortedError(f"sequence {chunk.sequence} ended before its chunk {chunk.gang.name} began")
        engine.tell(did.ChunkStarted(engine.worker, chunk.gang.number))

    def _tell_done(self, chunk: PrefillChunk, result: ChunkResult, joined: bool = False) -> None:
        """Send the tokens to commit to the gManager; of a chunk that ``joined`` another one's gang, that it did."""
        engine, gang, exchanged = self._engine, chunk.gang.number, self._engine.runtime.exchanged
        engine.tell_adapters()
        token, scored = result.token, result.scored
        if (chosen := result.chosen) is not None:
            first = chosen.tokens[0]
            engine.tell(
                did.Prefilled(
                    engine.worker, chunk.sequence, gang, first, "stop", exchanged, None, scored, chosen, joined
                )
            )
            return
        if chunk.sampling is None or token is None:
            engine.tell(did.ChunkDone(engine.worker, chunk.sequence, gang, exchanged, scored, joined, result.pooled))
            return
        reason: FinishReason | None = None
        assert engine.model is not None
        if token in engine.model.eos_token_ids and not chunk.sampling.ignore_eos:
            reason = "stop"
        elif chunk.sampling.max_new_tokens == 1:
            reason = "length"
        engine.tell(
            did.Prefilled(
                engine.worker, chunk.sequence, gang, token, reason, exchanged, result.logprob, scored, None, joined
            )
        )
