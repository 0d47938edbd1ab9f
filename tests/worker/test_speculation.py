"""Speculation pays: wrong proposals cost almost nothing, and right tokens save steps."""

from __future__ import annotations

import itertools
import random
from array import array
from collections.abc import Sequence

import pytest
from _examples import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from distkv_dask.gang import SequenceState
from distkv_dask.placement import Placement, Span
from distkv_dask.sampling import SamplingParams
from distkv_dask.worker.speculation.gate import CREDIT, MOST_SHARE, Chances, StepSeconds, worth_trying
from distkv_dask.worker.speculation.speculation import MOST, Speculation

PROSE = [7, 1, 2, 3, 4, 5, 6, 8, 9] * 30
"""Repeats itself, so that there is always a proposal."""


def committed(sequence: int, prompt: Sequence[int], answer: Sequence[int], placement: Placement = ()) -> SequenceState:
    length = len(prompt) + len(answer) - 1
    return SequenceState(
        sequence, placement, length, answer[-1], 9999, SamplingParams(), array("i", prompt), tuple(answer)
    )


class Simulated:
    """A home whose steps take one second, and more for each proposed token."""

    def __init__(self, batch: int, once: float, each: float, text: Sequence[int] = PROSE) -> None:
        self.made = Speculation("auto")
        self.seconds = 0.0
        self.tried: list[int] = []
        self.tokens = dict.fromkeys(range(batch), 1)
        self._added = once, each
        self._says = [itertools.cycle(text) for _ in range(batch)]
        self.made.begin_window([committed(at, text, [next(says)]) for at, says in enumerate(self._says)])

    def step(self, agrees: bool) -> None:
        """All sequences repeat their text, or words of the text that are never the proposed ones."""
        drafts = self.made.propose(dict.fromkeys(self.tokens, 99))
        taken = {}
        for sequence, says in enumerate(self._says):
            tried = [*drafts.get(sequence, ()), None]
            if not agrees:
                taken[sequence] = [2 if tried[0] is None else (tried[0] + 1) % 4]
                continue
            taken[sequence] = [next(says)]
            while taken[sequence][-1] == tried.pop(0):
                taken[sequence].append(next(says))
        self.tokens = {at: self.tokens[at] + len(tokens) for at, tokens in taken.items()}
        self.tried.append(sum(map(len, drafts.values())))
        seconds = 1 + (self._added[0] + self._added[1] * self.tried[-1]) * (self.tried[-1] > 0)
        self.seconds += seconds
        self.made.learn(seconds, taken)


@pytest.mark.parametrize("batch", [1, 4, 32])
@pytest.mark.parametrize("added", [(0.05, 0.02), (0.3, 0.1), (1.0, 0.5)])
def test_what_is_never_right_costs_hardly_anything(batch: int, added: tuple[float, float]) -> None:
    home = Simulated(batch, *added, random.Random(0).choices(range(4), k=500))
    for steps in range(1, 600):
        home.step(agrees=False)
        largest = added[0] + added[1] * max(home.tried)
        assert home.seconds <= steps * (1 + MOST_SHARE) + CREDIT + largest
    assert batch > 4 or any(home.tried), "it was never tried"


@pytest.mark.parametrize(("batch", "times"), [(1, 5), (4, 3)])
def test_what_is_always_right_is_tried_and_saves_most_of_the_time(batch: int, times: int) -> None:
    home = Simulated(batch, 0.05, 0.03)
    for _ in range(200):
        home.step(agrees=True)
    assert sum(home.tokens.values()) / batch > times * home.seconds
    assert max(home.tried) <= MOST * batch


def test_it_is_tried_again_when_answers_begin_to_repeat_what_was_said() -> None:
    home = Simulated(1, 0.1, 0.05, [0, 1, 2, 3] * 30)
    for _ in range(300):
        home.step(agrees=False)
    before = home.tokens[0]
    for _ in range(300):
        home.step(agrees=True)
    assert home.tokens[0] - before > 600


chances = st.lists(st.floats(0.01, 1), max_size=4).map(lambda some: list(itertools.accumulate(some, min)))


@settings(max_examples=examples(300), deadline=None)
@given(st.lists(chances, min_size=1, max_size=3), st.floats(0, 1), st.floats(0.001, 1))
def test_as_many_tokens_are_tried_as_pay_most(batch: list[list[float]], once: float, each: float) -> None:
    def gain(counts: Sequence[int]) -> float:
        right = sum(sum(some[:count]) for some, count in zip(batch, counts, strict=True))
        return right / len(batch) - (once + each * sum(counts)) * any(counts)

    best = max(map(gain, itertools.product(*(range(len(some) + 1) for some in batch))))
    assert gain(worth_trying(batch, (once, each))) == pytest.approx(best, abs=1e-9)


def test_what_steps_take_is_measured() -> None:
    seconds = StepSeconds()
    for tried in (0, 0, 0, *range(1, 9), *range(1, 9), *range(1, 9)):
        seconds.learn(2.0 + (0.4 + 0.1 * tried) * (tried > 0), tried)
    assert seconds.plain == pytest.approx(2.0)
    assert seconds.added() == pytest.approx((0.2, 0.05), abs=0.02)
    for _ in range(200):
        seconds.learn(2.5, 1)
    assert not seconds.is_known, "the machine may be another one by now"


def test_one_sequence_that_is_hard_to_guess_does_not_spoil_the_others_much() -> None:
    home = Chances()
    hard, easy = Chances(home), Chances(home)
    for _ in range(30):
        hard.learn(4, right=False)
        easy.learn(4, right=True)
    assert hard.of(4) < 0.1
    assert easy.of(4) > 0.9
    assert 0.2 < home.of(4) < 0.8
    assert home.of(5) == Chances().of(5)


def test_a_window_that_was_given_up_is_forgotten() -> None:
    made = Speculation(4)
    placement = (Span("w", 0, 64, document=5), Span("w", 64, 9999))
    batch = [committed(at, PROSE[:81], [7], placement) for at in (1, 2)]
    room = {1: 99, 2: 2, 3: 99}
    made.begin_window(batch)
    assert made.propose(room) == {}, "what steps take is not known"
    made.learn(1.0, {1: [50], 2: [50], 3: [50]})
    assert made.begin_window(batch).propose(room) == {1: [1, 2, 3, 4], 2: [1, 2]}
    made.learn(1.0, {1: [1, 2, 9], 2: [1, 2, 3], 3: [50]})
    assert made.begin_window([committed(1, PROSE[:81], [7, 1, 2, 9]), batch[1]]).propose(room)[2] == [1, 2]


def test_sequences_without_a_prompt_are_left_alone() -> None:
    made = Speculation("auto").begin_window([committed(1, (), [1])])
    for _ in range(3):
        assert made.propose({1: 9}) == {}
        made.learn(1.0, {1: [1]})
