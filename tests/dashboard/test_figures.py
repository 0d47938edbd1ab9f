"""Figures for users and monitoring are right: counters never decrease, percentiles are those of the data."""

from __future__ import annotations

import statistics
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distkv_dask.completion import Timings
from distkv_dask.gang import Exchanged, WindowResult
from distkv_dask.scheduler.dashboard.panels_time import OVER, rates
from distkv_dask.scheduler.engines.figures import HISTORY, Figures, Latency, Sample

times = st.lists(st.floats(0, 1e4, allow_nan=False), min_size=1, max_size=200)


@given(times)
def test_a_histogram_counts_every_time_in_the_bucket_that_its_bounds_say(seconds: list[float]) -> None:
    latency = Latency((0.1, 1, 10))
    for one in seconds:
        latency.observe(one)
    assert sum(latency.counts) == len(seconds)
    for at, bound in enumerate(latency.bounds):
        assert sum(latency.counts[: at + 1]) == sum(one <= bound for one in seconds)
    assert latency.sum == pytest.approx(sum(seconds))


@given(times)
def test_percentiles_lie_among_the_times_and_the_median_is_one_of_the_middle(seconds: list[float]) -> None:
    latency = Latency((1,))
    for one in seconds:
        latency.observe(one)
    found = latency.percentiles()
    assert found["p50"] == statistics.median_low(seconds)
    assert found["p50"] <= found["p90"] <= found["p99"] <= max(seconds)
    assert sum(one <= found["p99"] for one in seconds) >= 0.99 * len(seconds)


def test_no_requests_have_no_percentiles() -> None:
    assert Latency((1,)).percentiles() == {}


def test_a_window_adds_to_the_totals_and_to_its_homes_anatomy() -> None:
    figures = Figures()
    figures.window("a", WindowResult({}, {}, 10, 2.0, Exchanged(0.2, 0.5, 100, 400), gap=0.1))
    figures.window("a", WindowResult({}, {}, 30, 4.0, Exchanged(0.2, 0.5, 300, 1200), gap=0.1))
    figures.window("b", WindowResult({}, {}, 0, 0.0))
    assert figures.totals["windows"] == 2
    assert figures.totals["decode_steps"] == 40
    assert figures.anatomy["a"].seconds == 6.0
    assert (figures.anatomy["a"].sending, figures.anatomy["a"].waiting) == (0.4, 1.0)
    assert (figures.totals["bytes_to_holders"], figures.totals["bytes_to_homes"]) == (400, 1600)
    assert "b" not in figures.anatomy


def test_only_answered_requests_count_as_latencies() -> None:
    figures = Figures()
    figures.ended("length", Timings(queued=1.0, prefill=2.0, decode=9.0), 10)
    figures.ended("cancelled", Timings(queued=50.0), 0)
    assert figures.finished == Counter({"length": 1, "cancelled": 1})
    assert figures.first_token.percentiles()["p50"] == 3.0
    assert figures.per_token.percentiles()["p50"] == 1.0


def test_closing_an_engine_takes_nothing_from_the_counters() -> None:
    past, engine = Figures(), Figures()
    past.ended("length", Timings(queued=1.0, prefill=1.0, decode=1.0), 2)
    engine.ended("stop", Timings(queued=100.0, prefill=1.0, decode=1.0), 2)
    engine.prefilled(70)
    engine.happened(0.0, "move", "")
    past.absorb(engine)
    assert past.finished == Counter({"length": 1, "stop": 1})
    assert past.totals == {"prefilled_tokens": 70, "move_events": 1}
    assert sum(past.queue.counts) == 2
    assert past.queue.sum == 101.0


def test_rates_are_tokens_by_time() -> None:
    history = [Sample(float(at), 100 * at, 7 * at, 0, 0, 0) for at in range(20)]
    found = rates(history)
    assert set(found["prefill"]) == {100.0}
    assert set(found["decode"]) == {7.0}
    assert found["ago"] == [float(ago) for ago in range(19 - OVER, -1, -1)]


def test_the_history_is_bounded() -> None:
    figures = Figures()
    for at in range(2 * HISTORY):
        figures.sample(float(at), Counter())
    assert len(figures.history) == HISTORY
