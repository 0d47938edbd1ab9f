"""The tasks of gangs at layer granularity on one worker: a forward that tasks carry from layer to layer, and answers.

A forward lives from its first task to its last. If it fails or is aborted, it is dropped at once, and its later tasks
fail because they do not find it.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING

import torch

from distkv_dask.errors import GangAbortedError
from distkv_dask.gang import DecodeWindow, Gang, PrefillChunk
from distkv_dask.worker.by_layer.attention import attend_part
from distkv_dask.worker.by_layer.paused import PausedForward
from distkv_dask.worker.device import Use
from distkv_dask.worker.tensor_message import TensorMessage

if TYPE_CHECKING:
    from distkv_dask.worker.engine import WorkerEngine


class LayerTasks:
    """An open engine's tasks at layer granularity.

    Parameters
    ----------
    engine
        The engine on this worker.
    """

    def __init__(self, engine: WorkerEngine) -> None:
        self._engine = engine
        self._paused = engine.runtime.paused

    def begin_forward(self, work: PrefillChunk | DecodeWindow) -> TensorMessage | None:
        """Start a forward; the question of its first layer, or None when there is nothing to compute."""
        engine, gang = self._engine, work.gang
        if gang.number in self._paused:
            raise GangAbortedError(f"the forward of {gang.name} has already begun on this worker")
        engine.chunks.prepare(work) if isinstance(work, PrefillChunk) else engine.prepare_window()
        forward = PausedForward(gang, engine.spec.config.timeout_start)
        self._paused[gang.number] = forward
        parts: dict[str, float] = {}  # Dask itself measures layers, which are its tasks here
        run = (
            partial(engine.chunks.run, work, parts)
            if isinstance(work, PrefillChunk)
            else partial(engine.run_window, work, parts)
        )
        try:
            forward.result = engine.lanes.home.submit(run)
        except Exception:
            del self._paused[gang.number]
            raise
        forward.result.add_done_callback(partial(self._ended, forward))
        return self._question(forward, 0)

    def layer(self, gang: Gang, layer: int, answers: Sequence[TensorMessage | None]) -> TensorMessage | None:
        """Continue a forward with the partials of the previous layer; returns the request of this layer."""
        forward = self._forward(gang)
        forward.answer(layer - 1, [one for one in answers if one is not None])
        return self._question(forward, layer)

    def finish(self, gang: Gang, layers: int, answers: Sequence[TensorMessage | None]) -> int:
        """End a forward with the partials of the last layer; returns its decode steps, or its prompt tokens."""
        forward = self._forward(gang)
        forward.answer(layers - 1, [one for one in answers if one is not None])
        return forward.result.result()

    def attend(self, gang: Gang, question: TensorMessage) -> TensorMessage | None:
        """Answer a request as a holder, on the holder lane; None if it needs nothing from this worker."""
        engine = self._engine
        try:
            return engine.lanes.holder.submit(partial(self._attend, gang, question)).result()
        except Exception as error:
            engine.fail(gang, error)
            raise

    def _attend(self, gang: Gang, question: TensorMessage) -> TensorMessage | None:
        engine = self._engine
        engine.check(gang)
        part = question.about.parts.get(engine.worker)
        if part is None:
            return None
        pool = engine.runtime.pool
        with torch.inference_mode(), pool.device.stream(Use.HOLDER):
            out, lse = attend_part(pool, part, question)
            return TensorMessage(engine.worker, (out.cpu(), lse.cpu()))

    def _forward(self, gang: Gang) -> PausedForward:
        try:
            return self._paused[gang.number]
        except KeyError:
            raise GangAbortedError(f"no forward of {gang.name} is paused here: it failed or was aborted") from None

    @staticmethod
    def _question(forward: PausedForward, layer: int) -> TensorMessage | None:
        question = forward.question(layer)
        if question is None:
            forward.result.result()  # raises what ended the forward, if it failed
        return question

    def _ended(self, forward: PausedForward, result: Future[int]) -> None:
        """On the home lane: the forward has ended."""
        del self._paused[forward.gang.number]
        forward.end()
        if not result.cancelled() and isinstance(error := result.exception(), Exception):
            self._engine.fail(forward.gang, error)
