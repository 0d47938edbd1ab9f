"""The performance model against its definition: sums over steps, tokens and bytes, and the best possible fit."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from distkv_dask.gang import WindowResult
from distkv_dask.geometry import Geometry, Measurement
from distkv_dask.placement import Endpoint, Span
from distkv_dask.scheduler.costs.calibration import MOST, SECONDS, Calibration
from distkv_dask.scheduler.costs.fit import fit_curve, shape_of
from distkv_dask.scheduler.costs.model import Curve, Link, PerformanceModel, Shape, fit_decode
from distkv_dask.scheduler.costs.presets import PRESET
from distkv_dask.scheduler.ledger.ledger import Ledger

BLOCK = 4
CURVE = Curve(step=0.04, row=0.002, token=3e-6, prompt=0.001, pair=2e-7)
OTHER = Curve(step=0.01, row=0.001, token=9e-6, prompt=0.002, pair=5e-7)
SHAPE = Shape(layers=3, kv_bytes=96, query_bytes=64, partial_bytes=80)
MODEL = PerformanceModel(SHAPE, CURVE, Link(1e-5, 3e9), Link(3e-5, 1e9), {"home": CURVE, "holder": OTHER})

sample = st.tuples(st.sampled_from([1, 2, 4, 8]), st.sampled_from([10, 100, 1000, 5000]), st.floats(1e-3, 0.1))


@given(st.lists(sample, min_size=3, max_size=8))
def test_no_steps_that_cost_nothing_or_more_fit_samples_better(samples: list[tuple[int, int, float]]) -> None:
    """Check the conditions of Karush, Kuhn and Tucker, which only the solution of nonnegative least squares meets."""
    measured = np.array(samples, float)
    assume(np.linalg.matrix_rank(np.column_stack([np.ones(len(measured)), measured[:, :2]])) == 3)
    found = np.array(fit_decode(samples))
    features = np.column_stack([np.ones(len(measured)), measured[:, :2]]) / measured[:, 2:]
    slope = features.T @ (features @ found - 1)
    scale = np.linalg.norm(features, axis=0)
    assert (found >= 0).all()
    assert (slope / scale >= -1e-6).all(), "more of something would fit better"
    assert np.abs(slope / scale)[found > 0] == pytest.approx(0, abs=1e-6), "less of something would fit better"


def test_a_fit_without_noise_is_that_of_numpy() -> None:
    samples = [(b, t, CURVE.decode(b, t)) for b, t in ((1, 64), (8, 512), (1, 4096), (8, 4096))]
    batch, tokens, seconds = np.array(samples).T
    best, *_ = np.linalg.lstsq(np.column_stack([np.ones(4), batch, tokens]), seconds, rcond=None)
    assert fit_decode(samples) == pytest.approx(best, rel=1e-6)


@given(st.integers(1, 300), st.integers(0, 300))
def test_a_prompt_costs_what_its_tokens_cost_each_attending_to_all_before_it(tokens: int, before: int) -> None:
    one_by_one = sum(CURVE.prompt + (before + at + 0.5) * CURVE.pair for at in range(tokens))
    assert CURVE.prefill(tokens, before) == pytest.approx(one_by_one)


def test_a_step_of_nobody_costs_nothing() -> None:
    assert CURVE.decode(0, 0) == CURVE.decode(0, 1000) == 0
    assert CURVE.decode(1, 0) == CURVE.step + CURVE.row


@given(st.integers(0, 50))
def test_an_exchange_is_queries_one_way_and_partials_back_in_every_layer(rows: int) -> None:
    for link in (MODEL.inside, MODEL.between):
        layer = link.seconds(rows * SHAPE.query_bytes) + link.seconds(rows * SHAPE.partial_bytes)
        assert MODEL.exchange(link, rows) == pytest.approx(SHAPE.layers * layer)
    here, near, far = Endpoint("w0", "a", 1), Endpoint("w1", "a", 1), Endpoint("w2", "b", 1)
    assert MODEL.link(here, near) is MODEL.inside
    assert MODEL.link(here, far) is MODEL.between
    assert MODEL.inside.seconds(0) == 1e-5
    assert MODEL.inside.seconds(6e9) == pytest.approx(2 + 1e-5)
    assert MODEL.transfer(MODEL.between, 1000) == pytest.approx(3e-5 + 1000 * 96 / 1e9)


@pytest.mark.parametrize(
    ("dtype", "like"), [("float32", np.float32), ("bfloat16", np.float16), ("float16", np.float16)]
)
def test_sizes_of_a_model_are_those_of_its_tensors(dtype: str, like: Any) -> None:
    shape = shape_of(Geometry(5, 8, 2, 16, 100, 1000, dtype))
    assert shape.layers == 5
    assert shape.kv_bytes == np.zeros((5, 2, 2, 1, 16), like).nbytes
    assert shape.query_bytes == np.zeros((8, 16), like).nbytes
    assert shape.partial_bytes == np.zeros((8, 16), np.float32).nbytes + np.zeros(8, np.float32).nbytes


times = st.floats(1e-4, 0.1)


@given(times, times, times, times, st.integers(1, 4), st.integers(5, 16))
@example(0.01277409882262459, 0.0625, 0.0625, 0.0625, 3, 5)
def test_whatever_was_timed_no_cost_is_negative_and_the_smallest_step_is_met(
    one: float, many: float, short: float, long: float, small: int, large: int
) -> None:
    measured = Measurement(
        decode=((small, 0, one), (large, 0, many)),
        prompt=((128, 0, short), (128, 4096, long)),
        attention=((64, short), (4096, long)),
    )
    curve = fit_curve(measured, PRESET.curve)
    assert min(curve.step, curve.row, curve.token, curve.prompt, curve.pair) >= 0
    assert curve.decode(small, 0) == pytest.approx(one)
    if one <= many <= one * large / small:
        assert curve.decode(large, 0) == pytest.approx(many)
    if long >= short:
        assert curve.token == pytest.approx((long - short) / (4096 - 64))
        assert curve.pair == pytest.approx((long - short) / (128 * 4096))
        if short > 128 * 64 * curve.pair:
            assert curve.prefill(128) == pytest.approx(short)


# Windows


def ledger_of(*placements: tuple[Span, ...]) -> Ledger:
    ledger = Ledger(BLOCK)
    for worker in ("home", "holder"):
        ledger.add_worker(Endpoint(worker, "host", 1), 1000)
    for number, placement in enumerate(placements):
        is_document = number == 0
        ledger.reserve(number, placement, idle=is_document)
        ledger.commit(number, placement[-1].stop if is_document else placement[-1].stop - 20)
    return ledger


def stepwise(ledger: Ledger, new: dict[int, int], steps: int) -> float:
    """Mean seconds of a step in which all sequences decode, as a plain sum."""
    seconds = 0.0
    for step in range(steps):
        held = {"home": 0.0, "holder": 0.0}
        rows = {"home": 0, "holder": 0}
        read = set()
        for sequence in new:
            account = ledger.sequences[sequence]
            seen = set()
            for span in account.placement:
                tokens = min(span.stop, account.length + step + 0.5) - span.start
                if tokens <= 0 or (span.document, span.start) in read:
                    continue
                read |= {(span.document, span.start)} if span.document is not None else set()
                held[span.worker] += tokens
                seen.add(span.worker)
                rows["holder"] += span.worker == "holder"
        attention = max(held["home"] * CURVE.token, held["holder"] * OTHER.token)
        exchange = MODEL.exchange(MODEL.inside, rows["holder"]) if rows["holder"] else 0.0
        seconds += CURVE.step + len(new) * CURVE.row + attention + exchange
    return seconds / steps


PLACEMENTS = (
    (Span("holder", 0, 40), Span("home", 40, 80)),  # the document
    (Span("home", 0, 100),),
    (Span("holder", 0, 60), Span("home", 60, 120)),
    (Span("holder", 0, 40, document=0), Span("home", 40, 80, document=0), Span("home", 80, 140)),
    (Span("holder", 0, 40, document=0), Span("home", 40, 80, document=0), Span("home", 80, 120)),
    (Span("home", 0, 8), Span("holder", 8, 200), Span("home", 200, 240)),
)


@given(st.sets(st.integers(1, 5), min_size=1), st.integers(1, 8))
def test_a_windows_expected_step_is_the_mean_of_its_steps(batch: set[int], steps: int) -> None:
    ledger = ledger_of(*PLACEMENTS)
    calibration = Calibration(ledger)
    calibration.follow(MODEL)
    result = WindowResult({sequence: [1] * steps for sequence in batch}, {}, steps, 1.0)
    assert calibration.expected("home", result) == pytest.approx(stepwise(ledger, dict.fromkeys(batch, steps), steps))


def test_a_sequence_that_takes_part_in_half_of_the_steps_counts_for_half() -> None:
    ledger = ledger_of(*PLACEMENTS[:2])
    calibration = Calibration(ledger)
    calibration.follow(MODEL)
    found = calibration.expected("home", WindowResult({1: [1] * 5}, {}, 10, 1.0))
    assert found == pytest.approx(CURVE.step + 0.5 * CURVE.row + 0.5 * 82.5 * CURVE.token)


@given(st.floats(0.1, 9.0), st.lists(st.integers(1, 30), min_size=1, max_size=20))
def test_how_slow_a_worker_seems_depends_on_the_time_that_it_took_not_on_its_windows(
    times: float, windows: list[int]
) -> None:
    ledger = ledger_of(*PLACEMENTS[:2])
    calibration = Calibration(ledger)
    followed = calibration.follow(MODEL)
    total = 0.0
    for steps in windows:
        result = WindowResult({1: [1] * steps}, {}, steps, 0.0)
        seconds = times * steps * calibration.expected("home", result)
        calibration.observe("home", WindowResult({1: [1] * steps}, {}, steps, seconds))
        total += seconds
    held = min(MOST, max(1 / MOST, times))
    assert calibration.slower("home") == pytest.approx(held ** (1 - math.exp(-total / SECONDS)), rel=1e-6)
    assert followed.of("home").step == pytest.approx(CURVE.step * calibration.slower("home"))
    assert followed.of("holder") == OTHER
    calibration.forget_worker("home")
    assert calibration.slower("home") == 1.0
