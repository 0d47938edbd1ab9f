"""Forwards as CUDA graphs: Python launches the kernels of a step once, and the card replays them.

A model of 36 layers has over a thousand launches in a step, which at small batches take Python longer than the card.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

from torch import Tensor

from distkv_dask.errors import in_words
from distkv_dask.geometry import Geometry
from distkv_dask.worker.device import Device, Graph
from distkv_dask.worker.model.hook import AttentionStep
from distkv_dask.worker.model.no_attention import NoAttention

Forward = Callable[[AttentionStep], Tensor]
"""A forward with its inputs always in the same memory; returns the logits."""


class CapturedForward:
    """The forward of similar steps: the same tensors with other values.

    The first step is launched by Python, because libraries create handles, workspaces and kernels at their first use.
    The second is captured and run. The steps after it are replayed.

    Parameters
    ----------
    device
        Where the model is; a card.
    forward
        The forward.
    attention
        Its attention, which uses the same memory in every step.
    queued
        Whether the attention only queues work on the card. Then one graph has the whole forward; otherwise attention is
        not captured, and each graph has the work between the attention of two layers.
    """

    def __init__(self, device: Device, forward: Forward, attention: AttentionStep, queued: bool) -> None:
        self._device = device
        self._forward = forward
        self._attention = attention
        self._queued = queued
        self._warm = False
        self._pieces: list[Callable[[], object]] = []
        """The parts of a step in order: graphs, and attention between them."""
        self._logits: Tensor | None = None

    def __call__(self) -> Tensor:
        """Run a step; its logits, which the next step overwrites."""
        if not self._warm:
            self._warm = True
            return self._forward(self._attention)
        if self._logits is None:
            self._pieces, self._logits = self._capture()
            return self._logits
        for piece in self._pieces:
            piece()
        return self._logits

    def _capture(self) -> tuple[list[Callable[[], object]], Tensor]:
        recorder = _Recorder(self._device, self._attention)
        with recorder:
            logits = self._forward(self._attention if self._queued else recorder)
        return recorder.pieces, logits


class _Recorder:
    """Captures the work queued inside a ``with`` statement, in pieces, and runs each when it is complete.

    As the attention of a forward it ends a piece, attends as usual, and starts the next piece.
    """

    def __init__(self, device: Device, attention: AttentionStep) -> None:
        self._device = device
        self._attention = attention
        self._open: Graph | None = None
        self.pieces: list[Callable[[], object]] = []

    def __enter__(self) -> None:
        self._begin_piece()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._end_piece()
        elif self._open is not None:
            with suppress(RuntimeError):  # which only says that there was an error
                self._open.end_capture()

    def attend(self, layer: int, *given: Any) -> Tensor:
        """Attend between two pieces."""
        self._end_piece()
        attend = partial(self._attention.attend, layer, *given)
        self.pieces.append(attend)
        out = attend()
        self._begin_piece()
        return out

    def _begin_piece(self) -> None:
        graph = self._device.graph()
        assert graph is not None, "the host has no graphs"
        graph.begin_capture()
        self._open = graph

    def _end_piece(self) -> None:
        assert self._open is not None
        graph, self._open = self._open, None
        graph.end_capture()
        graph.replay()
        self.pieces.append(graph.replay)


def why_not_captured(device: Device, forward: Forward, geometry: Geometry) -> str:
    """Try to capture a forward, without attention.

    Parameters
    ----------
    device
        Where the model is; a card.
    forward
        A forward over any tokens.
    geometry
        Sizes of the model.

    Returns
    -------
    str
        Why it cannot be captured, for example because experts are chosen on the host; empty if it can be.
    """
    nothing = NoAttention(geometry.value_dim)
    forward(nothing)
    try:
        with _Recorder(device, nothing):
            forward(nothing)
    except RuntimeError as error:
        return in_words(error)
    return ""
