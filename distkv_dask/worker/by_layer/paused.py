"""A home's forward that pauses in every layer: the home lane computes, tasks fetch its queries and bring partials.

The forward holds the home lane while it is paused, like one that waits for channels, so a home's work stays in order.
It continues when a task brings the layer's partials, and ends with an error when its gang is aborted or no task comes
in time.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from types import TracebackType

from distkv_dask.errors import ChannelTimeoutError, GangAbortedError
from distkv_dask.gang import Gang
from distkv_dask.worker.plan import Part
from distkv_dask.worker.tensor_message import TensorMessage


class PausedForward:
    """The home's side of a gang whose bytes travel as results of tasks: the handoff between the lane and the tasks.

    Parameters
    ----------
    gang
        The gang.
    limit
        Seconds from a layer's question to its answers: tasks have to be started on every holder in that time.
    """

    def __init__(self, gang: Gang, limit: float) -> None:
        self.gang = gang
        self.result: Future[int]
        """The result of the home lane."""
        self._limit = limit
        self._changed = threading.Condition()
        self._layer = -1
        self._question: TensorMessage | None = None
        self._answers: Sequence[TensorMessage] | None = None
        self._ended = False
        self._abort_reason: str | None = None

    # The home lane's thread

    def __enter__(self) -> PausedForward:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Drop all tensors."""
        self._question = self._answers = None

    def open_sessions(self, parts: Mapping[str, Part]) -> None:
        """Nothing to open: each request carries its rows."""

    def change(self, step: int, old: Mapping[str, Part], new: Mapping[str, Part]) -> None:
        """Nothing to send."""

    def check(self) -> None:
        """Raise GangAbortedError if the gang was aborted."""
        if self._abort_reason is not None:
            raise GangAbortedError(f"gang {self.gang.name} was aborted: {self._abort_reason}")

    def ask(self, layer: int, question: TensorMessage) -> None:
        """Hand a layer's question to its task."""
        with self._changed:
            self._layer, self._question, self._answers = layer, question, None
            self._changed.notify_all()

    def wait_for_answers(self, layer: int) -> Sequence[TensorMessage]:
        """Wait for the answers of a layer.

        Raises
        ------
        ChannelTimeoutError
            They do not come in time.
        GangAbortedError
            The gang was aborted.
        """
        with self._changed:
            came = self._changed.wait_for(lambda: self._answers is not None or self._abort_reason, self._limit)
            self.check()
            if not came or self._answers is None:
                raise ChannelTimeoutError(
                    f"no partials of layer {layer} came to {self.gang.name} within {self._limit:g} s; a holder may be "
                    "frozen or cut off. If its worker is only busy with other tasks, raise distkv.timeouts.start"
                )
            return self._answers

    # Other threads

    def question(self, layer: int) -> TensorMessage | None:
        """Wait for the forward's request in a layer; None if it ends without one."""
        with self._changed:
            self._changed.wait_for(lambda: self._ended or self._layer == layer)
            return None if self._ended else self._question

    def answer(self, layer: int, answers: Sequence[TensorMessage]) -> None:
        """Bring the partials of a layer.

        Raises
        ------
        GangAbortedError
            The forward does not wait for them: it has ended, or Dask ran a task twice.
        """
        with self._changed:
            if self._ended or self._layer != layer or self._answers is not None:
                raise GangAbortedError(f"the forward of {self.gang.name} does not wait for partials of layer {layer}")
            self._answers = answers
            self._changed.notify_all()

    def abort(self, reason: str) -> None:
        """End the gang; a waiting forward raises GangAbortedError."""
        with self._changed:
            self._abort_reason = reason
            self._changed.notify_all()

    def end(self) -> None:
        """The home lane has finished it: no more requests will come."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()
