"""Parts of a home that record their work; used instead of the plain ones while there is a trace.

Each overrides the few methods that start or end an activity; the plain classes do not know about traces.
"""

from __future__ import annotations

import selectors
from collections.abc import Callable, Mapping
from functools import partial
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any, cast

import torch

from distkv_dask.worker.home.attention import DistAttention, Local
from distkv_dask.worker.home.decode import DecodeLoop
from distkv_dask.worker.home.exchange import Asking, Exchange
from distkv_dask.worker.home.gang import HomeGang
from distkv_dask.worker.home.native_exchange import new_exchange
from distkv_dask.worker.home.near_layers import SplitAttention
from distkv_dask.worker.home.python_exchange import PythonExchange, Remote
from distkv_dask.worker.plan import Part
from distkv_dask.worker.trace import Ring, span

if TYPE_CHECKING:
    from distkv_dask.worker.model.hook import AttentionStep
    from distkv_dask.worker.model.loaded import LoadedModel, Repeated
    from distkv_dask.worker.model.recurrent import Past


class TracedGang(HomeGang):
    """A gang whose begin, a wait for the holders' tasks, is recorded."""

    def __init__(self, ring: Ring, *args: Any) -> None:
        super().__init__(*args)
        self._ring = ring

    def open_sessions(self, parts: Mapping[str, Part]) -> None:
        """Open the gang."""
        with span(self._ring, "begin", self.gang.number, len(parts)):
            super().open_sessions(parts)


class TracedDecodeLoop(DecodeLoop):
    """A window whose steps are recorded."""

    def __init__(self, ring: Ring, *args: Any) -> None:
        super().__init__(*args)
        self._ring = ring

    def _step(self) -> None:
        began, step, batch = perf_counter_ns(), self._steps, len(self._live)
        try:
            super()._step()
        finally:
            self._ring.put("step", began, self._gang.gang.number, step, size=batch)


class TracedModel:
    """A model whose forwards are recorded, with what is between two layers' attention."""

    def __init__(self, model: LoadedModel, ring: Ring) -> None:
        self._model = model
        self._ring = ring
        self.geometry = model.geometry
        self.eos_token_ids = model.eos_token_ids
        self.device = model.device
        self.follower = model.follower
        self.past = model.past
        self.adapter = model.adapter

    def forward(
        self, token_ids: torch.Tensor, positions: torch.Tensor, step: AttentionStep, keep: torch.Tensor | None = None,
        past: Past | None = None, take_hidden: Callable[[torch.Tensor], None] | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """Run the model."""
        forward = partial(self._model.forward, token_ids, positions, step, keep, past, take_hidden)
        return self._recorded(forward, step, len(token_ids))

    def repeated(
        self, inputs: torch.Tensor, step: AttentionStep, queued: bool, past: Past | None, steps: int
    ) -> Repeated:
        """The forward of similar steps."""
        return partial(self._recorded, self._model.repeated(inputs, step, queued, past, steps), step, len(inputs[0]))

    def _recorded(self, forward: Repeated, step: AttentionStep, tokens: int) -> torch.Tensor:
        traced = step.far if isinstance(step, SplitAttention) else step
        if not isinstance(traced, TracedAttention):
            return forward()
        traced.left = began = perf_counter_ns()
        try:
            return forward()
        finally:
            self._ring.put("model", traced.left, traced.number, traced.step)
            self._ring.put("forward", began, traced.number, traced.step, size=tokens)


class TracedAttention(DistAttention):
    """DistAttention whose parts are recorded, layer by layer and holder by holder."""

    def __init__(self, ring: Ring, gang: HomeGang, *args: Any) -> None:
        self._ring = ring  # first: the exchange that is made next needs it
        super().__init__(gang, *args)
        self.number = gang.gang.number
        self.left = 0
        """When the model's own code last continued, by :func:`time.perf_counter_ns`."""

    def attend(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """Attention of one layer."""
        began = self._ring.put("model", self.left, self.number, self.step, layer)
        try:
            return super().attend(layer, q, k, v, scale, sinks)
        finally:
            self.left = self._ring.put("attention", began, self.number, self.step, layer)

    def _new_exchange(self, asking: Asking) -> Exchange:
        return new_exchange(asking, self._ring, partial(TracedExchange, self._ring))

    def _attend_locally(
        self, local: Local, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
    ) -> None:
        began = perf_counter_ns()
        try:
            super()._attend_locally(local, layer, q, k, v, scale)
        finally:
            self._ring.put("local attention", began, self.number, self.step, layer)


class TracedExchange(PythonExchange):
    """An exchange in Python whose parts are recorded; C++ records its own (native/marks.h)."""

    def __init__(self, ring: Ring, asking: Asking) -> None:
        super().__init__(asking)
        self._number = asking.gang.number
        self._ring = ring

    def _ask(self, remote: Remote, layer: int, step: int, scale: float) -> None:
        began = perf_counter_ns()
        try:
            super()._ask(remote, layer, step, scale)
        finally:
            self._ring.put("send", began, self._number, step, layer, remote.channel.peer, remote.asked_bytes)

    def _select(
        self, selector: selectors.BaseSelector, layer: int, step: int
    ) -> list[tuple[selectors.SelectorKey, int]]:
        began = perf_counter_ns()
        try:
            return super()._select(selector, layer, step)
        finally:
            self._ring.put("wait", began, self._number, step, layer)

    def _wait(self, remote: Remote, layer: int, step: int) -> None:
        began = perf_counter_ns()
        try:
            super()._wait(remote, layer, step)
        finally:
            self._ring.put("wait", began, self._number, step, layer, remote.channel.peer, remote.answer_bytes)

    def _merge(self, remote: Remote | None, merge: Callable[[], None], layer: int, step: int) -> None:
        began = perf_counter_ns()
        super()._merge(remote, merge, layer, step)
        if remote is not None:
            self._ring.put("merge", began, self._number, step, layer, remote.channel.peer)
        elif self._asking.together is not None:  # all of a layer's at once, on a card
            self._ring.put("merge", began, self._number, step, layer)


def traced_model(model: LoadedModel, ring: Ring | None) -> LoadedModel:
    """The model, or one that records."""
    return model if ring is None else cast("LoadedModel", TracedModel(model, ring))
