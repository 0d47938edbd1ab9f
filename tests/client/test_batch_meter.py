"""The remaining time of a batch is estimated by tokens: longer rows take longer."""

from __future__ import annotations

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distkv_dask.client.batch.answer_plan import Answer
from distkv_dask.client.batch.meter import Meter
from distkv_dask.client.batch.rows import Row
from distkv_dask.client.batch.runner import Outcome

NOTHING = pa.RecordBatch.from_struct_array(pa.array([{}], pa.struct([])))


def ended(label: int | str, prompt: int = 0, new: int = 0, reused: int = 0, error: str | None = None) -> Outcome:
    answer = None if error else Answer("", "stop", prompt, new, reused_tokens=reused)
    return Outcome(Row(label, "", NOTHING, lambda: None), None, 1.0, answer, error)  # type: ignore[arg-type, return-value]


def test_nothing_is_said_before_anything_is_known() -> None:
    assert Meter(10, {}, 5.0).left([], 1.0) is None
    unknown = Meter(None, {}, 5.0)
    unknown.add([ended(0, 100)])
    assert unknown.left([], 1.0) is None


def test_requests_in_flight_count_by_their_own_tokens() -> None:
    meter = Meter(3, {}, 2.0)
    meter.add([ended(0, 80, 10)])  # 100 tokens of prompt take as long
    assert meter.left([(1, 480, 10), (2, 80, 60)], 10.0) == pytest.approx(10 * (500 + 200) / 100)


def test_rows_that_nobody_has_read_are_like_those_before_them_of_the_same_size() -> None:
    alike = Meter(4, {}, 1.0)
    alike.add([ended(0, 100), ended(1, 300)])
    assert alike.left([], 10.0) == pytest.approx(10.0)
    by_size = Meter(3, {"a": 100, "b": 300, "c": 1600}, 1.0)
    by_size.add([ended("a", 50), ended("b", 150)])
    assert by_size.left([], 10.0) == pytest.approx(40.0)


def test_reused_tokens_and_errors_took_no_time() -> None:
    meter = Meter(3, {}, 1.0)
    meter.add([ended(0, 1100, reused=1000), ended(1, error="empty")])
    assert meter.left([], 10.0) == pytest.approx(5.0)


@given(
    st.lists(st.tuples(st.integers(1, 10**6), st.integers(0, 10**4)), min_size=1, max_size=20),
    st.lists(st.tuples(st.integers(1, 10**6), st.integers(1, 10**4)), max_size=20),
    st.integers(0, 100),
)
def test_the_time_left_is_never_negative_and_ends_at_nothing(
    done: list[tuple[int, int]], asked: list[tuple[int, int]], unread: int
) -> None:
    meter = Meter(len(done) + len(asked) + unread, {}, 3.0)
    meter.add([ended(at, *tokens) for at, tokens in enumerate(done)])
    left = meter.left([(-1 - at, *tokens) for at, tokens in enumerate(asked)], 10.0)
    assert left is not None
    assert left >= 0
    assert (left == 0) == (not asked and not unread)
