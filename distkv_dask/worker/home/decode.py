"""A decode window: steps over a batch whose sequences leave it when they stop."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Protocol

import torch

from distkv_dask.errors import DistKVError
from distkv_dask.gang import DecodeWindow, Exchanged, SequenceState, WindowResult
from distkv_dask.worker.by_layer.attention import LayerAttention
from distkv_dask.worker.by_layer.paused import PausedForward
from distkv_dask.worker.home.attention import DistAttention
from distkv_dask.worker.home.gang import HomeGang
from distkv_dask.worker.home.home_state import Ended
from distkv_dask.worker.home.near_layers import SplitAttention
from distkv_dask.worker.home.progress import Progress
from distkv_dask.worker.model.logprobs import draw_batch
from distkv_dask.worker.model.lora import AdaptedRows, adapted_rows, adapting
from distkv_dask.worker.plan import Part, Stored

if TYPE_CHECKING:
    from distkv_dask.worker.model.loaded import LoadedModel
    from distkv_dask.worker.model.recurrent import Past

Attention = DistAttention | LayerAttention | SplitAttention


class Speculator(Protocol):
    """Proposes draft tokens for sequences, and learns which of them were right."""

    def propose(self, room: Mapping[int, int]) -> Mapping[int, Sequence[int]]:
        """Drafts to try in the next step, for some of the sequences; ``room`` is the maximum for each."""

    def learn(self, seconds: float, taken: Mapping[int, Sequence[int]]) -> None:
        """Take the seconds of the step, and the tokens that each sequence took in it."""


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
        Makes the attention of the steps until the batch changes, from their parts by worker, the batch, and the number
        of the first of them.
    cutting
        Cuts the batch into parts by worker, as :func:`distkv_dask.worker.plan.cut`.
    """

    def __init__(
        self,
        gang: HomeGang | PausedForward,
        model: LoadedModel,
        batch: Sequence[SequenceState],
        attention: Callable[[Mapping[str, Part], Sequence[Stored], int], Attention],
        cutting: Callable[[Sequence[Stored]], dict[str, Part]],
    ) -> None:
        self._gang = gang
        self._model = model
        self._new_attention = attention
        self._cutting = cutting
        self._all = [Progress(state) for state in batch]
        for one in self._all:
            with one.guard():
                one.begin_window(model)
        self._live = list(self._all)
        self._drop_finished()
        self._parts: dict[str, Part] = {}
        self._attention: Attention | None = None
        self._steps_left_as_is = 0
        self._steps = 0
        self._exchanged = Exchanged()
        self._past: Past | None = None
        self._adapted = AdaptedRows()
        self._speculator: Speculator | None = None
        self._rows = self._all
        """The sequences whose states are in the past, in its order."""

    def run(self, window: DecodeWindow, past: Past | None = None, speculator: Speculator | None = None) -> WindowResult:
        """Run steps until the window is over or all sequences have stopped.

        Parameters
        ----------
        window
            The window.
        past
            The states of the batch's sequences, if the model has recurrent layers.
        speculator
            Proposes drafts; None for models with recurrent layers, whose states cannot be rolled back.
        """
        began, self._past, self._speculator, self._window = time.perf_counter(), past, speculator, window
        if not self._live:
            self._gang.open_sessions({})
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
        errors = {one.state.sequence: one.error for one in self._all if one.error is not None}
        speculated = {one.state.sequence: one.speculated for one in self._all if one.speculated.proposed}
        seconds = time.perf_counter() - began
        logprobs = {one.state.sequence: one.logprobs for one in self._all if one.logprobs}
        return WindowResult(tokens, finished, self._steps, seconds, self._exchanged, 0.0, errors, speculated, logprobs)

    def ended(self) -> Iterator[Ended]:
        """The sequences that have not stopped, after the window."""
        for row, one in enumerate(self._rows):
            if one.finished is None:
                yield Ended(one.state.sequence, one.length, None if self._past is None else self._past.state(row))

    def _step(self) -> None:
        if self._propose() or self._steps_left_as_is == 0:
            self._cut()
        live = self._live
        if not live:
            return
        began = time.perf_counter()  # a cut may have waited for holders to begin
        assert self._attention is not None
        tokens = [token for one in live for token in (one.last_token, *one.drafts)]
        at = [one.length + ahead for one in live for ahead in range(1 + len(one.drafts))]
        self._inputs.host[:] = torch.tensor([tokens, at])
        self._inputs.up()
        with adapting(self._adapted):
            logits = self._forward()
        self._attention.advance()
        self._steps += 1
        self._steps_left_as_is -= 1
        taken = self._draw(logits)
        if self._speculator is not None:
            self._speculator.learn(time.perf_counter() - began, taken)
        self._drop_finished()
        if len(self._live) < len(live) or len(tokens) > len(live):
            self._steps_left_as_is = 0

    def _propose(self) -> bool:
        """Set the drafts of the next step; returns whether there are any."""
        if self._speculator is None:
            return False
        drafts = self._speculator.propose({one.state.sequence: one.room for one in self._live})
        for one in self._live:
            one.drafts = drafts.get(one.state.sequence, ())
        return any(one.drafts for one in self._live)

    def _draw(self, logits: torch.Tensor) -> dict[int, list[int]]:
        """Add a token to each sequence, and further ones while its drafts are right; returns the tokens of each."""
        before = [len(one.tokens) for one in self._live]
        device, going, ahead = self._model.device, self._live, 0
        firsts = list(accumulate((1 + len(one.drafts) for one in going), initial=0))
        rows = dict(zip(going, firsts, strict=False))
        while going:
            some = logits
            if len(going) < len(logits):
                some = logits[device.put(torch.tensor([rows[one] + ahead for one in going]))]
            for one, drawn in zip(going, draw_batch(some, [one.draw for one in going], device), strict=True):
                if isinstance(drawn, DistKVError):
                    one.fail(drawn)
                    continue
                with one.guard():
                    one.take_token(drawn, self._model.eos_token_ids)
            going = [one for one in going if one.is_right(ahead)]
            ahead += 1
        taken = {one.state.sequence: one.tokens[at:] for one, at in zip(self._live, before, strict=True)}
        for one in self._live:
            one.count_drafts(len(taken[one.state.sequence]))
        return taken

    def _cut(self) -> None:
        """Cut the batch again: at its start, after it lost sequences, or when a tail continues in the next span."""
        self._close_attention()
        gang = self._gang.gang
        members = {gang.home, *(holder.worker for holder in gang.holders)}
        for one in self._live:
            with one.guard():
                one.check_plan(members)
        self._drop_finished()
        live = self._live
        new = [1 + len(one.drafts) for one in live]
        batch = [
            Stored(one.state.sequence, one.state.placement, one.length, count)
            for one, count in zip(live, new, strict=True)
        ]
        parts = self._cutting(batch)
        if self._steps == 0:
            self._gang.open_sessions(parts)
        else:
            self._gang.change(self._steps, self._parts, parts)
        if not live:
            return
        if self._past is not None and len(live) < len(self._rows):
            self._past.keep([row for row, one in enumerate(self._rows) if one.finished is None])
            self._rows = list(live)
        self._attention = self._new_attention(parts, batch, self._steps)
        self._inputs = self._model.device.pair((2, sum(new)), torch.int64)
        self._parts = parts
        self._adapted = adapted_rows([(one.adapter, count) for one, count in zip(live, new, strict=True)])
        self._steps_left_as_is = min(one.steps_in_span for one in live)
        self._forward = self._model.repeated(
            self._inputs.there, self._attention, self._attention.queued, self._past, self._steps_alike()
        )

    def _steps_alike(self) -> int:
        """Number of steps for which the attention stays the same, if no sequence stops earlier."""
        if isinstance(self._gang, PausedForward):
            return 1  # its attention makes new tensors in every step
        if any(one.drafts for one in self._live):
            return 1
        most = [self._steps_left_as_is, *(one.state.remaining - len(one.tokens) for one in self._live)]
        if self._window.steps is not None:
            most.append(self._window.steps - self._steps)
        return min(most)

    def _drop_finished(self) -> None:
        self._live = [one for one in self._live if one.finished is None]

    def _close_attention(self) -> None:
        if self._attention is not None:
            self._exchanged += self._attention.exchanged
            self._attention.close()
            self._attention = None
