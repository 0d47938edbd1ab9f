"""A sequence in a decode window: its committed state, and what the window added."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from distkv_dask.errors import DistKVError, PlanError, portable
from distkv_dask.gang import SequenceState, Speculated
from distkv_dask.logprobs import TokenLogprob
from distkv_dask.sampling import FinishReason
from distkv_dask.worker.model.logprobs import Drawn
from distkv_dask.worker.model.sampling import Draw
from distkv_dask.worker.model.structured import Follower
from distkv_dask.worker.plan import tail_of

if TYPE_CHECKING:
    from distkv_dask.worker.model.loaded import LoadedModel
    from distkv_dask.worker.model.lora import PlacedAdapter


class Progress:
    """A sequence in a window: its committed state, and what the window added.

    An error of this sequence ends only this sequence: everything done for it is inside :meth:`guard`.
    """

    def __init__(self, state: SequenceState) -> None:
        self.state = state
        self.follower: Follower | None = None
        self.adapter: PlacedAdapter | None = None
        self.length = state.length
        self.last_token = state.last_token
        self.tokens: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        """Those of the tokens, if they are wanted."""
        self.drafts: Sequence[int] = ()
        """Tokens that the current step tries after the last one."""
        self.speculated = Speculated()
        self.history = [*state.prompt, *state.generated] if state.sampling.repetition_penalty != 1 else []
        self.finished: FinishReason | None = None
        self.error: DistKVError | None = None

    @contextmanager
    def guard(self) -> Iterator[None]:
        """If an exception is raised inside, end only this sequence with it."""
        try:
            yield
        except Exception as error:
            self.fail(portable(error, f"sequence {self.state.sequence}"))

    def fail(self, error: DistKVError) -> None:
        """End with an error."""
        self.error, self.finished = error, "error"

    def begin_window(self, model: LoadedModel) -> None:
        """Load its adapter, if it has one, and continue its schema, if it has one, from the committed tokens."""
        self.adapter = model.adapter(self.state.adapter)
        self.follower = model.follower(self.state.sampling, self.state.generated)

    @property
    def draw(self) -> Draw:
        """How its next token is chosen."""
        return Draw(self.state.sampling, self.length + 1, self.history, self.follower)

    def take_token(self, drawn: Drawn, eos_token_ids: frozenset[int]) -> None:
        """Count a step, at whose end a token was drawn."""
        token = drawn.token
        self.length += 1
        if token in eos_token_ids and not self.state.sampling.ignore_eos:
            self.finished = "stop"
            return
        if self.follower is not None:
            self.follower.take_token(token)
        self.last_token = token
        self.tokens.append(token)
        if drawn.logprob is not None:
            self.logprobs.append(drawn.logprob)
        if self.history:
            self.history.append(token)
        if len(self.tokens) == self.state.remaining:
            self.finished = "length"

    def check_plan(self, members: Collection[str]) -> None:
        """Raise PlanError if its next token has no room, or if some of its KV is on none of the ``members``."""
        tail = tail_of(self.state.sequence, self.state.placement, self.length)
        for span in self.state.placement:
            if (span is tail or span.filled(self.length)) and span.worker not in members:
                raise PlanError(
                    f"tokens {span.start} to {span.stop} of sequence {self.state.sequence} were planned on "
                    f"{span.worker}, which is not in its gang; this is a fault of the plan, please report it",
                    self.state.sequence,
                )

    def is_right(self, ahead: int) -> bool:
        """Whether the token just taken equals draft number ``ahead`` (from 0), so that the one after it counts."""
        return self.finished is None and ahead < len(self.drafts) and self.drafts[ahead] == self.last_token

    def count_drafts(self, taken: int) -> None:
        """Count the drafts of a step that took ``taken`` tokens: all of these but the last were drafts."""
        self.speculated = self.speculated.more(len(self.drafts), max(0, taken - 1))

    @property
    def room(self) -> int:
        """Maximum drafts of the next step: they have to fit into the tail's span and into the answer."""
        stop = next((span.stop for span in self.state.placement if span.start <= self.length < span.stop), 0)
        return max(0, min(stop - self.length, self.state.remaining - len(self.tokens)) - 1)

    @property
    def steps_in_span(self) -> int:
        """Steps until the tail continues on another worker."""
        tail = tail_of(self.state.sequence, self.state.placement, self.length)
        return tail.stop - self.length
