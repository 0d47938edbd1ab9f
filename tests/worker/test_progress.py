"""A sequence in a window ends with its answer, its room or its plan, and its errors do not end others."""

from __future__ import annotations

from typing import Any

import pytest

from distkv_dask.errors import CapacityError, DistKVError, InvalidRequestError, PlanError
from distkv_dask.gang import SequenceState, Speculated
from distkv_dask.logprobs import TokenLogprob
from distkv_dask.placement import Placement, Span
from distkv_dask.sampling import SamplingParams
from distkv_dask.worker.home.progress import Progress
from distkv_dask.worker.model.logprobs import Drawn

EOS = frozenset({2, 3})
WIDE: Placement = (Span("w0", 0, 32), Span("w1", 32, 48), Span("w0", 48, 64))


def progress(length: int = 40, remaining: int = 5, placement: Placement = WIDE, **sampling: Any) -> Progress:
    return Progress(
        SequenceState(7, placement, length, 11, remaining, SamplingParams(**sampling), (1, 2, 3), (8, 11))  # type: ignore[arg-type]
    )


def take(one: Progress, *tokens: int) -> None:
    for token in tokens:
        one.take_token(Drawn(token), EOS)


def test_tokens_are_counted_until_the_answer_is_as_long_as_it_may_be() -> None:
    one = progress(remaining=3)
    take(one, 50, 51)
    assert (one.length, one.last_token, one.tokens, one.finished) == (42, 51, [50, 51], None)
    take(one, 52)
    assert (one.length, one.tokens, one.finished) == (43, [50, 51, 52], "length")
    assert one.state == progress(remaining=3).state, "what is committed stays as it is, for another try"


@pytest.mark.parametrize("end", sorted(EOS))
def test_an_end_of_text_ends_the_answer_and_is_no_part_of_it(end: int) -> None:
    one = progress()
    take(one, 50, end)
    assert (one.length, one.last_token, one.tokens, one.finished) == (42, 50, [50], "stop")
    told = progress(remaining=2, ignore_eos=True)
    take(told, end, end)
    assert (told.tokens, told.finished) == ([end, end], "length")


def test_an_end_of_text_in_the_place_of_the_last_token_is_an_end_of_text() -> None:
    one = progress(remaining=1)
    take(one, 2)
    assert (one.tokens, one.finished) == ([], "stop")


def test_only_penalties_look_at_what_came_before() -> None:
    plain, penalized = progress(), progress(repetition_penalty=1.2)
    for one in (plain, penalized):
        take(one, 50)
    assert plain.draw.history == []
    assert penalized.draw.history == [1, 2, 3, 8, 11, 50]
    assert (plain.draw.position, plain.draw.params) == (42, plain.state.sampling)


def test_draws_of_a_repeated_window_are_at_the_positions_of_the_first() -> None:
    first = progress()
    positions = [first.draw.position]
    for token in (50, 51):
        take(first, token)
        positions.append(first.draw.position)
    assert positions == [41, 42, 43]
    again = progress(length=41)  # one step was committed
    assert again.draw.position == positions[1]


def test_log_probabilities_are_those_of_the_tokens_of_the_answer() -> None:
    one = progress()
    for token in (50, 51, 2):
        one.take_token(Drawn(token, TokenLogprob(token, -0.5)), EOS)
    assert [logprob.token_id for logprob in one.logprobs] == one.tokens == [50, 51]


class Forms:
    """A schema that ends with an error at a token."""

    def __init__(self) -> None:
        self.taken: list[int] = []

    def take_token(self, token: int) -> None:
        if token == 99:
            raise InvalidRequestError("no form")
        self.taken.append(token)


def test_a_schema_follows_the_tokens_of_the_answer_and_its_error_ends_one_sequence() -> None:
    one, other = progress(), progress()
    forms = Forms()
    one.follower = forms  # type: ignore[assignment]
    for token in (50, 99):
        for each in (one, other):
            with each.guard():
                take(each, token)
    assert forms.taken == [50]
    assert (one.finished, one.tokens, str(one.error)) == ("error", [50], "no form")
    assert (other.finished, other.tokens, other.error) == (None, [50, 99], None)
    done = progress()
    done.follower = forms  # type: ignore[assignment]
    take(done, 2)
    assert forms.taken == [50], "the end of the text is no token of the form"


@pytest.mark.parametrize(
    ("raised", "kind", "said"),
    [
        (CapacityError("no room"), CapacityError, r"^no room$"),
        (ZeroDivisionError("by what?"), DistKVError, r"^ZeroDivisionError on sequence 7: by what\?$"),
    ],
)
def test_an_error_that_ends_a_sequence_can_be_sent(raised: Exception, kind: type[DistKVError], said: str) -> None:
    one = progress()
    with one.guard():
        raise raised
    assert (type(one.error), one.finished) == (kind, "error")
    with pytest.raises(DistKVError, match=said):
        raise one.error or AssertionError


def test_a_worker_that_is_told_to_end_is_not_kept_by_a_sequence() -> None:
    one = progress()
    with pytest.raises(KeyboardInterrupt), one.guard():
        raise KeyboardInterrupt
    assert one.finished is None


@pytest.mark.parametrize(
    ("length", "remaining", "generated", "room", "steps"),
    [
        (40, 100, 0, 7, 8),  # to the end of the span, which the token itself needs
        (40, 100, 3, 4, 5),
        (46, 100, 0, 1, 2), (47, 100, 0, 0, 1),  # the last token of a span
        (47, 100, 1, 15, 16),  # and on the next worker
        (31, 100, 0, 0, 1), (32, 100, 0, 15, 16),
        (40, 5, 0, 4, 8), (40, 5, 4, 0, 4),  # to the end of the answer
        (63, 100, 0, 0, 1),
    ],
)  # fmt: skip
def test_drafts_fit_into_the_span_of_the_tail_and_into_the_answer(
    length: int, remaining: int, generated: int, room: int, steps: int
) -> None:
    one = progress(length, remaining)
    take(one, *range(50, 50 + generated))
    assert (one.room, one.steps_in_span) == (room, steps)


def test_a_sequence_whose_room_is_used_up_tries_nothing_and_is_a_fault_of_the_plan() -> None:
    one = progress(length=63)
    take(one, 50)
    assert one.room == 0
    for ask in (lambda: one.steps_in_span, lambda: one.check_plan({"w0", "w1"})):
        with pytest.raises(PlanError, match="holds 64 tokens and has room reserved for 64") as caught:
            ask()
        assert caught.value.sequence == 7


@pytest.mark.parametrize(
    ("length", "members", "missing"),
    [
        (40, {"w0", "w1"}, None), (40, {"w1"}, "0 to 32 .* on w0"), (40, {"w0"}, "32 to 48 .* on w1"),
        (20, {"w0"}, None),  # nothing is on the other worker yet
        (32, {"w0"}, "32 to 48 .* on w1"), (32, {"w0", "w1"}, None),  # the next token will be
        (48, {"w1"}, "0 to 32 .* on w0"),
    ],
)  # fmt: skip
def test_workers_with_tokens_or_with_the_next_one_are_in_the_gang(
    length: int, members: set[str], missing: str | None
) -> None:
    one = progress(length)
    if missing is None:
        one.check_plan(members)
        return
    with pytest.raises(PlanError, match=f"tokens {missing}, which is not in its gang") as caught:
        one.check_plan(members)
    assert caught.value.sequence == 7


def test_drafts_count_as_far_as_they_are_what_was_drawn() -> None:
    one = progress(remaining=4)
    one.drafts = (50, 51, 60)
    right = []
    for ahead, token in enumerate((50, 51, 52)):
        take(one, token)
        right.append(one.is_right(ahead))
    assert right == [True, True, False]
    one.count_drafts(3)
    assert one.speculated == Speculated(3, 2)
    one.drafts = (70, 71)
    one.count_drafts(0)  # the step's first token ended it
    assert one.speculated == Speculated(5, 2)
    one.drafts = (53, 54)
    take(one, 53)
    assert one.finished == "length"
    assert not one.is_right(0), "nothing comes after the last token"
    ended = progress()
    ended.drafts = (2, 5)
    take(ended, 2)
    assert not ended.is_right(0)
    assert not progress().is_right(0), "nothing was tried"
