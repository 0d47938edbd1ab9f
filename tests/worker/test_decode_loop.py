"""A decode window with a trivial model: tokens, ends and plans of any batch are those of its sequences alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from _examples import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from distkv_dask.errors import GangAbortedError, PlanError
from distkv_dask.gang import DecodeWindow, Exchanged, Gang, SequenceState, WindowResult
from distkv_dask.placement import Endpoint, Span
from distkv_dask.sampling import SamplingParams
from distkv_dask.worker.device import HOST
from distkv_dask.worker.home.decode import DecodeLoop
from distkv_dask.worker.plan import Part, Stored, cut, tail_of

VOCAB, EOS = 31, 0
GANG = Gang("engine", 1, "gang-1", 1, "w0", (Endpoint("w1", "host", 1), Endpoint("w2", "host", 2)))


def following(token: int, position: int) -> int:
    """The model's next token after a token at a position."""
    return (7 * token + 3 * position + 1) % VOCAB


class Model:
    """Logits of :func:`following`; ``inputs`` records tokens and positions, ``alike`` the expected steps."""

    def __init__(self) -> None:
        self.device, self.eos_token_ids = HOST, frozenset({EOS})
        self.inputs: list[list[list[int]]] = []
        self.alike: list[int] = []

    def follower(self, *_: Any) -> None:
        return None

    def adapter(self, _: Any) -> None:
        return None

    def repeated(self, inputs: torch.Tensor, step: Any, queued: bool, past: Any, steps: int) -> Any:
        self.alike.append(steps)
        return lambda: self.forward(inputs)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        self.inputs.append(inputs.tolist())
        tokens, positions = self.inputs[-1]
        logits = torch.zeros(len(tokens), VOCAB)
        for row, one in enumerate(zip(tokens, positions, strict=True)):
            logits[row, following(*one)] = 5.0
        return logits


class Attention:
    """Attention of a batch; counts its steps."""

    queued = False

    def __init__(self, parts: Mapping[str, Part], batch: Sequence[Stored], step: int) -> None:
        self.parts, self.batch, self.step = parts, list(batch), step
        self.steps = self.closed = 0

    @property
    def exchanged(self) -> Exchanged:
        return Exchanged(sent_bytes=self.steps)

    def advance(self) -> None:
        self.steps += 1

    def close(self) -> None:
        self.closed += 1


class Members:
    """A gang that records when its holders are told about a batch."""

    def __init__(self, abort_at: int | None = None) -> None:
        self.gang, self.told = GANG, list[tuple[int, Any]]()
        self._checks, self._abort_at = 0, abort_at

    def open_sessions(self, parts: Mapping[str, Part]) -> None:
        self.told.append((0, parts))

    def change(self, step: int, old: Mapping[str, Part], new: Mapping[str, Part]) -> None:
        assert old == self.told[-1][1], "holders are told what changed since they were told last"
        self.told.append((step, new))

    def check(self) -> None:
        if self._checks == self._abort_at:
            raise GangAbortedError("gang gang-1 was aborted")
        self._checks += 1


class Window:
    """A window over some sequences, with records of its calls."""

    def __init__(self, batch: Sequence[SequenceState], members: Members | None = None) -> None:
        self.model, self.members, self.attentions = Model(), members or Members(), list[Attention]()
        self.loop = DecodeLoop(self.members, self.model, batch, self._attention, cut)  # type: ignore[arg-type]

    def _attention(self, parts: Mapping[str, Part], batch: Sequence[Stored], step: int) -> Any:
        self.attentions.append(Attention(parts, batch, step))
        return self.attentions[-1]

    def run(self, steps: int | None = None, seconds: float = 60.0, speculator: Any = None) -> WindowResult:
        return self.loop.run(DecodeWindow(GANG, 0, steps, seconds), None, speculator)


@st.composite
def states(draw: st.DrawFn) -> SequenceState:
    """A sequence whose room may end before its answer does."""
    ends = sorted(draw(st.sets(st.integers(1, 40), min_size=1, max_size=4)))
    spans, start = [], 0
    for at, stop in enumerate(ends):
        spans.append(Span(("w0", "w1", "w2")[at % 3], start, stop))
        start = stop
    length, remaining = draw(st.integers(0, ends[-1])), draw(st.integers(1, 30))
    sampling = SamplingParams(ignore_eos=draw(st.booleans()))
    return SequenceState(0, tuple(spans), length, draw(st.integers(1, VOCAB - 1)), remaining, sampling)


def batches(most: int = 4) -> st.SearchStrategy[list[SequenceState]]:
    numbered = st.lists(states(), min_size=1, max_size=most)
    return numbered.map(lambda some: [replace(one, sequence=at) for at, one in enumerate(some)])


def alone(state: SequenceState, steps: int | None) -> tuple[list[int], str | None, int]:
    """Tokens, end and steps of a sequence, computed one token after the other."""
    tokens, last, length, done = list[int](), state.last_token, state.length, 0
    while steps is None or done < steps:
        if length >= state.placement[-1].stop:
            return tokens, "error", done
        last, length, done = following(last, length), length + 1, done + 1
        if last == EOS and not state.sampling.ignore_eos:
            return tokens, "stop", done
        tokens.append(last)
        if len(tokens) == state.remaining:
            return tokens, "length", done
    return tokens, None, done


@settings(max_examples=examples(150), deadline=None)
@given(batches(), st.none() | st.integers(1, 20))
def test_a_batch_has_the_tokens_and_ends_that_each_sequence_has_alone(
    batch: list[SequenceState], steps: int | None
) -> None:
    window = Window(batch)
    result = window.run(steps)
    expected = {one.sequence: alone(one, steps) for one in batch}
    assert result.tokens == {number: tokens for number, (tokens, _, _) in expected.items()}
    assert result.finished == {number: end for number, (_, end, _) in expected.items() if end is not None}
    assert result.steps == max(done for *_, done in expected.values())
    errors = {number: type(error) for number, error in result.errors.items()}
    assert errors == {number: PlanError for number, (_, end, _) in expected.items() if end == "error"}
    going = {one.sequence: one.length for one in window.loop.ended()}
    assert going == {
        one.sequence: one.length + len(expected[one.sequence][0]) for one in batch if expected[one.sequence][1] is None
    }


@settings(max_examples=examples(100), deadline=None)
@given(batches())
def test_holders_are_told_of_each_batch_before_its_first_step(batch: list[SequenceState]) -> None:
    window = Window(batch)
    result = window.run(12)
    told = window.members.told
    assert told[0][0] == 0
    assert [one.step for one in window.attentions] == [step for step, parts in told if parts]
    for one, ahead in zip(window.attentions, window.model.alike, strict=True):
        assert one.closed == 1
        assert 1 <= one.steps <= ahead, "a captured step would be repeated with another batch"
        assert one.parts == cut(one.batch)
        for sequence, placement, length, queries in one.batch:
            span = tail_of(sequence, placement, length)
            assert length + (one.steps - 1) * queries < span.stop, "its KV went into another span"
    assert sum(one.steps for one in window.attentions) == result.steps == result.exchanged.sent_bytes
    inputs = iter(window.model.inputs)
    for one in window.attentions:
        for step in range(one.steps):
            assert next(inputs)[1] == [stored.length + step for stored in one.batch]


class Guess:
    """Proposes tokens of which the first ``right`` are the model's; the loop must stay within ``room``."""

    def __init__(self, batch: Sequence[SequenceState], plan: Sequence[tuple[int, int]]) -> None:
        self.states = {one.sequence: (one.last_token, one.length) for one in batch}
        self._plan, self._at = plan, 0
        self.learned: list[dict[int, list[int]]] = []

    def propose(self, room: Mapping[int, int]) -> Mapping[int, Sequence[int]]:
        drafts = {}
        for sequence, most in room.items():
            count, right = self._plan[self._at % len(self._plan)]
            self._at += 1
            token, position = self.states[sequence]
            said = []
            for ahead in range(min(count, most)):
                token = following(token, position + ahead)
                said.append(token if ahead < right else (token + 1) % VOCAB)
            drafts[sequence] = said
        return drafts

    def learn(self, seconds: float, taken: Mapping[int, Sequence[int]]) -> None:
        self.learned.append({sequence: [*tokens] for sequence, tokens in taken.items()})
        for sequence, tokens in taken.items():
            if tokens:
                self.states[sequence] = tokens[-1], self.states[sequence][1] + len(tokens)


@settings(max_examples=examples(150), deadline=None)
@given(batches(3), st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=7))
def test_what_is_proposed_changes_no_token_and_no_end(batch: list[SequenceState], plan: list[tuple[int, int]]) -> None:
    window, guess = Window(batch), Guess(batch, plan)
    result = window.run(None, speculator=guess)
    for one in batch:
        tokens, end, _ = alone(one, None)
        assert result.tokens[one.sequence] == tokens
        assert result.finished[one.sequence] == end
        learned = [token for taken in guess.learned for token in taken.get(one.sequence, ())]
        assert learned == tokens
    for attention in window.attentions:
        for sequence, placement, length, queries in attention.batch:
            assert length + queries <= tail_of(sequence, placement, length).stop


def test_right_proposals_save_steps_and_are_counted() -> None:
    state = SequenceState(3, (Span("w0", 0, 99),), 5, 4, 12, SamplingParams(ignore_eos=True))
    window, guess = Window([state]), Guess([state], [(3, 3)])
    result = window.run(None, speculator=guess)
    assert result.steps == 3
    assert len(result.tokens[3]) == 12
    assert result.speculated == {3: (9, 9)}
    wrong = Window([state])
    result = wrong.run(None, speculator=Guess([state], [(3, 1)]))
    assert (result.steps, result.speculated[3].accepted) == (6, 6)


def test_a_window_ends_in_time_after_a_step_at_least() -> None:
    window = Window([SequenceState(1, (Span("w0", 0, 99),), 5, 4, 50, SamplingParams(ignore_eos=True))])
    assert window.run(seconds=0.0).steps == 1
    assert window.attentions[0].closed == 1


@pytest.mark.parametrize("steps", [0, 3])
def test_an_abort_ends_a_window_between_two_steps(steps: int) -> None:
    state = SequenceState(1, (Span("w0", 0, 99),), 5, 4, 50, SamplingParams(ignore_eos=True))
    window = Window([state], Members(abort_at=steps))
    with pytest.raises(GangAbortedError):
        window.run()
    assert len(window.model.inputs) == steps
    assert all(one.closed == 1 for one in window.attentions)


def test_a_sequence_on_a_worker_that_is_not_in_the_gang_fails_alone() -> None:
    fine = SequenceState(1, (Span("w1", 0, 8), Span("w0", 8, 99)), 9, 4, 3, SamplingParams(ignore_eos=True))
    lost = replace(fine, sequence=2, placement=(Span("w9", 0, 8), Span("w0", 8, 99)))
    empty = replace(fine, sequence=3, placement=(Span("w0", 0, 20), Span("w9", 20, 99)))
    result = Window([fine, lost, empty]).run()
    assert result.finished == {1: "length", 2: "error", 3: "length"}
    assert "tokens 0 to 8 of sequence 2 were planned on w9, which is not in its gang" in str(result.errors[2])


def test_a_form_that_cannot_be_followed_ends_its_sequence_before_the_first_step() -> None:
    class Strict(Model):
        def follower(self, sampling: SamplingParams, *_: Any) -> None:
            if sampling.regex is not None:
                raise ValueError("odd")

    fine = SequenceState(1, (Span("w0", 0, 99),), 9, 4, 2, SamplingParams(ignore_eos=True))
    odd = replace(fine, sequence=2, sampling=SamplingParams(regex="x"))
    members: Any = Members()
    loop = DecodeLoop(members, Strict(), [odd], lambda *_: SimpleNamespace(), cut)  # type: ignore[arg-type, return-value]
    result = loop.run(DecodeWindow(GANG, 0, None, 60.0))
    assert (result.steps, result.finished, result.tokens) == (0, {2: "error"}, {2: []})
    assert "ValueError on sequence 2: odd" in str(result.errors[2])
    assert members.told == [(0, {})], "holders wait for the gang to begin, whoever is in it"
