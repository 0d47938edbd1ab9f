"""A decode window: steps over a batch whose sequences leave it when they stop."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from distkv_dask.errors import DistKVError, PlanError, portable
from distkv_dask.gang import DecodeWindow, Exchanged, SequenceState, WindowResult
from distkv_dask.sampling import FinishReason
from distkv_dask.worker.by_layer.attention import LayerAttention
from distkv_dask.worker.by_layer.paused import PausedForward
from distkv_dask.worker.home.attention import DistAttention
from distkv_dask.worker.home.gang import HomeGang
from distkv_dask.worker.model.sampling import Draw, sample_batch
from distkv_dask.worker.model.structured import Follower
from distkv_dask.worker.plan import Part, Stored, tail_of

if TYPE_CHECKING:
    from distkv_dask.worker.model.loaded import LoadedModel
    from distkv_dask.worker.model.recurrent import Past, State

Attention = DistAttention | LayerAttention


class Progress:
    """A sequence in a window: its committed state, and what the window added.

    What goes wrong with it alone ends it alone, with an ``error``: :meth:`guard` is around all that is done for it.
    """

    def __init__(self, state: SequenceState) -> None:
        self.state = state
        self.follower: Follower | None = None
        self.length = state.length
        self.last_token = state.last_token
        self.tokens: list[int] = []
        self.history = list(state.history)
        self.finished: FinishReason | None = None
        self.error: DistKVError | None = None

    @contextmanager
    def guard(self) -> Iterator[None]:
        """End this sequence with an exception that is raised inside, and go on."""
        try:
            yield
        except Exception as error:
            self.fail(portable(error, f"sequence {self.state.sequence}"))

    def fail(self, error: DistKVError) -> None:
        """End with an error."""
        self.error, self.finished = error, "error"

    def follow(self, model: LoadedModel) -> None:
        """Go on with the schema, if there is one, from the committed tokens."""
        self.follower = model.follower(self.state.sampling, self.state.generated)

    @property
    def draw(self) -> Draw:
        """How its next token is chosen."""
        return Draw(self.state.sampling, self.length + 1, self.history, self.follower)

    def take_token(self, token: int, eos_token_ids: frozenset[int]) -> None:
        """Count a step, at whose end ``token`` was drawn."""
        self.length += 1
        if token in eos_token_ids and not self.state.sampling.ignore_eos:
            self.finished = "stop"
            return
        if self.follower is not None:
            self.follower.take_token(token)
        self.last_token = token
        self.tokens.append(token)
        if self.state.history:
            self.history.append(token)
        if len(self.tokens) == self.state.remaining:
            self.finished = "length"

    def check_plan(self, members: Collection[str]) -> None:
        """Raise PlanError when its next token has no place, or what is stored lies on none of the ``members``."""
        tail = tail_of(self.state.sequence, self.state.placement, self.length)
        for span in self.state.placement:
            if (span is tail or span.filled(self.length)) and span.worker not in members:
                raise PlanError(
                    f"tokens {span.start} to {span.stop} of sequence {self.state.sequence} were planned on "
                    f"{span.worker}, which is not in its gang; this is a fault of the plan, please report it",
                    self.state.sequence,
                )

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
    cutting
        Cuts the batch into parts by worker, as :func:`distkv_dask.worker.plan.cut`.
    """

    def __init__(
        self,
        gang: HomeGang | PausedForward,
        model: LoadedModel,
        batch: Sequence[SequenceState],
        attention: Callable[[Mapping[str, Part], int, int], Attention],
        cutting: Callable[[Sequence[Stored]], dict[str, Part]],
    ) -> None:
        self._gang = gang
        self._model = model
        self._new_attention = attention
        self._cutting = cutting
        self._all = [Progress(state) for state in batch]
        for one in self._all:
            with one.guard():
                one.follow(model)
        self._live = list(self._all)
        self._drop_finished()
        self._parts: dict[str, Part] = {}
        self._attention: Attention | None = None
        self._steps_left_as_is = 0
        self._steps = 0
        self._exchanged = Exchanged()
        self._past: Past | None = None
        self._rows = self._all
        """The sequences whose states are in the past, in its order."""

    def run(self, window: DecodeWindow, past: Past | None = None) -> WindowResult:
        """Run steps until the window is over or all sequences have stopped.

        Parameters
        ----------
        window
            The window.
        past
            The states of the batch's sequences, if the model has recurrent layers.
        """
        began, self._past = time.perf_counter(), past
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
        errors = {one.state.sequence: one.error for one in self._all if one.error is not None}
        seconds = time.perf_counter() - began
        return WindowResult(tokens, finished, self._steps, seconds, self._exchanged, errors=errors)

    def states(self) -> Iterator[tuple[int, int, State]]:
        """Number, length and state of the sequences that have not stopped, after the window."""
        if self._past is not None:
            for row, one in enumerate(self._rows):
                if one.finished is None:
                    yield one.state.sequence, one.length, self._past.state(row)

    def _step(self) -> None:
        if self._steps_left_as_is == 0:
            self._cut()
        live = self._live
        if not live:
            return
        assert self._attention is not None
        self._inputs.host[:] = torch.tensor([[one.last_token for one in live], [one.length for one in live]])
        self._inputs.up()
        token_ids, positions = self._inputs.there
        logits = self._model.forward(token_ids, positions, self._attention, None, self._past)
        self._attention.advance()
        self._steps += 1
        self._steps_left_as_is -= 1
        for one, drawn in zip(live, sample_batch(logits, [one.draw for one in live], self._model.device), strict=True):
            if isinstance(drawn, DistKVError):
                one.fail(drawn)
                continue
            with one.guard():
                one.take_token(drawn, self._model.eos_token_ids)
        self._drop_finished()
        if len(self._live) < len(live):
            self._steps_left_as_is = 0

    def _cut(self) -> None:
        """Cut the batch again: it begins, or lost sequences, or a tail moves on to the next span."""
        self._close_attention()
        gang = self._gang.gang
        members = {gang.home, *(holder.worker for holder in gang.holders)}
        for one in self._live:
            with one.guard():
                one.check_plan(members)
        self._drop_finished()
        live = self._live
        parts = self._cutting([Stored(one.state.sequence, one.state.placement, one.length) for one in live])
        if self._steps == 0:
            self._gang.begin(parts)
        else:
            self._gang.change(self._steps, self._parts, parts)
        if not live:
            return
        if self._past is not None and len(live) < len(self._rows):
            self._past.keep([row for row, one in enumerate(self._rows) if one.finished is None])
            self._rows = list(live)
        self._attention = self._new_attention(parts, len(live), self._steps)
        self._inputs = self._model.device.pair((2, len(live)), torch.int64)
        self._parts = parts
        self._steps_left_as_is = min(one.steps_in_span for one in live)

    def _drop_finished(self) -> None:
        self._live = [one for one in self._live if one.finished is None]

    def _close_attention(self) -> None:
        if self._attention is not None:
            self._exchanged += self._attention.exchanged
            self._attention.close()
            self._attention = None
