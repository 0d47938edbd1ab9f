"""A decode window: steps over a batch whose sequences leave it when they stop."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from distkv_dask.types import DecodeWindow, Exchanged, FinishReason, SequenceState, WindowResult
from distkv_dask.worker.attention import DistAttention
from distkv_dask.worker.gang import HomeGang
from distkv_dask.worker.layer_attention import LayerAttention
from distkv_dask.worker.paused import PausedForward
from distkv_dask.worker.plan import Part, Stored, cut, tail_of
from distkv_dask.worker.sampling import sample_batch
from distkv_dask.worker.structured import Follower

if TYPE_CHECKING:
    from distkv_dask.worker.model import LoadedModel

Attention = DistAttention | LayerAttention


class Progress:
    """A sequence in a window: its committed state, and what the window added."""

    def __init__(self, state: SequenceState, follower: Follower | None) -> None:
        self.state = state
        self.follower = follower
        self.length = state.length
        self.last_token = state.last_token
        self.tokens: list[int] = []
        self.history = list(state.history)
        self.finished: FinishReason | None = None

    def take(self, token: int, eos_token_ids: frozenset[int]) -> None:
        """Count a step, at whose end ``token`` was drawn."""
        self.length += 1
        if token in eos_token_ids and not self.state.sampling.ignore_eos:
            self.finished = "stop"
            return
        if self.follower is not None:
            self.follower.take(token)
        self.last_token = token
        self.tokens.append(token)
        if self.state.history:
            self.history.append(token)
        if len(self.tokens) == self.state.remaining:
            self.finished = "length"

    @property
    def steps_in_span(self) -> int:
        """Steps until the tail moves on to another worker."""
        tail = tail_of(self.state.sequence, self.state.placement, self.length)
        return tail.stop - self.length


class DecodeLoop:
    """Runs one window.

    Parameters
    ----------
    gang
        The running gang.
    model
        The weights.
    batch
        The sequences.
    attention
        Makes the attention of the steps until the batch changes, from their parts by worker, their number of tokens and
        the number of the first of them.
    """

    def __init__(
        self,
        gang: HomeGang | PausedForward,
        model: LoadedModel,
        batch: Sequence[SequenceState],
        attention: Callable[[Mapping[str, Part], int, int], Attention],
    ) -> None:
        self._gang = gang
        self._model = model
        self._new_attention = attention
        self._all = [Progress(state, model.follower(state.sampling, state.generated)) for state in batch]
        self._live = list(self._all)
        self._parts: dict[str, Part] = {}
        self._attention: Attention | None = None
        self._steps_left_as_is = 0
        self._steps = 0
        self._exchanged = Exchanged()

    def run(self, window: DecodeWindow) -> WindowResult:
        """Run steps until the window is over or all sequences have stopped."""
        began = time.perf_counter()
        if not self._live:
            self._gang.begin({})
        try:
            while self._live and (window.steps is None or self._steps < window.steps):
                self._gang.check()
                self._step()
                if time.perf_counter() - began >= window.seconds:
                    break
        finally:
            self._close_attention()
        tokens = {one.state.sequence: one.tokens for one in self._all}
        finished = {one.state.sequence: one.finished for one in self._all if one.finished is not None}
        return WindowResult(tokens, finished, self._steps, time.perf_counter() - began, self._exchanged)

    def _step(self) -> None:
        if self._steps_left_as_is == 0:
            self._cut()
        assert self._attention is not None
        live = self._live
        logits = self._model.forward(
            torch.tensor([one.last_token for one in live]),
            torch.tensor([one.length for one in live]),
            self._attention,
        )
        self._attention.advance()
        self._steps += 1
        self._steps_left_as_is -= 1
        for at, one in enumerate(live):
            if one.follower is not None:
                one.follower.restrict(logits[at])
        rows = [(one.state.sampling, one.length + 1, one.history) for one in live]
        for one, token in zip(live, sample_batch(logits, rows), strict=True):
            one.take(token, self._model.eos_token_ids)
        self._live = [one for one in live if one.finished is None]
        if len(self._live) < len(live):
            self._steps_left_as_is = 0

    def _cut(self) -> None:
        """Cut the batch anew: it begins, or lost sequences, or a tail moves on to the next span."""
        self._close_attention()
        live = self._live
        parts = cut([Stored(one.state.sequence, one.state.placement, one.length) for one in live])
        if self._steps == 0:
            self._gang.begin(parts)
        else:
            self._gang.change(self._steps, self._parts, parts)
        self._attention = self._new_attention(parts, len(live), self._steps)
        self._parts = parts
        self._steps_left_as_is = min(one.steps_in_span for one in live)

    def _close_attention(self) -> None:
        if self._attention is not None:
            self._exchanged += self._attention.exchanged
            self._attention.close()
            self._attention = None
