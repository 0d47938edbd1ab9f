"""The performance model follows the measured times of windows, but only for workers that it knows."""

from __future__ import annotations

from dataclasses import replace

import pytest

from distkv_dask.gang import Speculated, WindowResult
from distkv_dask.placement import Endpoint, Placement, Span
from distkv_dask.scheduler.costs.calibration import MOST, Calibration
from distkv_dask.scheduler.costs.model import Curve, Link, PerformanceModel, Shape
from distkv_dask.scheduler.ledger.ledger import Ledger

BLOCK = 16
CURVE = Curve(step=0.04, row=0.002, token=1e-5, prompt=0.001, pair=1e-7)
MODEL = PerformanceModel(
    Shape(10, 23_040, 1152, 2340), CURVE, Link(1e-5, 1e9), Link(1e-4, 1e9), {"w0": CURVE, "w1": CURVE}
)


@pytest.fixture
def ledger() -> Ledger:
    ledger = Ledger(BLOCK, 8)
    for number in range(3):
        ledger.add_worker(Endpoint(f"w{number}", "host", number), 1000)
    return ledger


def window(seconds: float, steps: int, *sequences: int) -> WindowResult:
    """The result of a window in which all sequences are decoded in all steps."""
    return WindowResult({one: [1] * steps for one in sequences}, {}, steps, seconds)


def place(ledger: Ledger, sequence: int, placement: Placement) -> None:
    ledger.reserve(sequence, placement)
    ledger.commit(sequence, placement[-1].stop - BLOCK)


def test_a_worker_that_became_slower_is_known_to_be_after_a_few_seconds_and_others_stay(ledger: Ledger) -> None:
    calibration = Calibration(ledger)
    model = calibration.follow(MODEL)
    place(ledger, 0, (Span("w0", 0, 1008),))
    step = 0.04 + 0.002 + 1000 * 1e-5  # 992 tokens are stored when the window begins, 1008 when it ends
    assert model.of("w0") == CURVE
    for _ in range(10):
        calibration.observe("w0", window(16 * 2 * step, 16, 0))
    assert calibration.slower("w0") == pytest.approx(2.0, rel=0.02)
    assert model.of("w0").prefill(100) == pytest.approx(2 * CURVE.prefill(100), rel=0.02)
    assert model.of("w1") == CURVE
    for _ in range(20):
        calibration.observe("w0", window(16 * step, 16, 0))
    assert model.of("w0").decode(1, 1000) == pytest.approx(step, rel=0.02)


def test_tokens_that_are_tried_are_rows_and_read_nothing_more(ledger: Ledger) -> None:
    calibration = Calibration(ledger)
    calibration.follow(MODEL)
    place(ledger, 0, (Span("w0", 0, 1008),))
    step = 0.04 + 4 * 0.002 + 1000 * 1e-5
    tried = replace(window(8 * step, 8, 0), tokens={0: [1] * 16}, speculated={0: Speculated(24, 8)})
    assert calibration.expected("w0", tried) == pytest.approx(step)


def test_long_windows_count_for_more_than_short_ones(ledger: Ledger) -> None:
    place(ledger, 0, (Span("w0", 0, 32),))
    learnt = []
    for steps in (1, 16):
        calibration = Calibration(ledger)
        calibration.follow(MODEL)
        calibration.observe("w0", window(steps * 0.1, steps, 0))
        learnt.append(calibration.slower("w0"))
    assert 1 < learnt[0] < learnt[1] < 0.1 / CURVE.decode(1, 16)


def test_what_holders_take_is_not_laid_to_the_home(ledger: Ledger) -> None:
    calibration = Calibration(ledger)
    calibration.follow(MODEL)
    place(ledger, 0, (Span("w1", 0, 1600), Span("w0", 1600, 1632)))
    place(ledger, 1, (Span("w0", 0, 32),))
    exchange = 10 * (2 * 1e-5 + (1152 + 2340) / 1e9)
    step = 0.04 + 2 * 0.002 + 1600 * 1e-5 + exchange
    calibration.observe("w0", window(step * 16, 16, 0, 1))
    assert calibration.slower("w0") == pytest.approx(1.0)


def test_a_shared_document_is_read_once(ledger: Ledger) -> None:
    calibration = Calibration(ledger)
    calibration.follow(MODEL)
    ledger.reserve(7, (Span("w0", 0, 1600),), idle=True)
    ledger.commit(7, 1600)
    for sequence in (0, 1):
        place(ledger, sequence, (Span("w0", 0, 1600, 7), Span("w0", 1600, 1632)))
    step = 0.04 + 2 * 0.002 + (1600 + 2 * 24) * 1e-5
    calibration.observe("w0", window(step * 16, 16, 0, 1))
    assert calibration.slower("w0") == pytest.approx(1.0)


def test_sequences_that_ended_count_for_the_steps_that_they_took_part_in(ledger: Ledger) -> None:
    calibration = Calibration(ledger)
    calibration.follow(replace(MODEL, curves={"w0": replace(CURVE, token=0.0)}))
    for sequence in (0, 1):
        place(ledger, sequence, (Span("w0", 0, 32),))
    calibration.observe("w0", WindowResult({0: [1] * 16, 1: [1] * 4, 5: [1] * 16}, {}, 16, 16 * (0.04 + 1.25 * 0.002)))
    assert calibration.slower("w0") == pytest.approx(1.0), "sequence 5 is not in the ledger any more"


@pytest.mark.parametrize("times", [100.0, 0.001])
def test_no_worker_seems_faster_or_slower_than_can_be(ledger: Ledger, times: float) -> None:
    calibration = Calibration(ledger)
    model = calibration.follow(MODEL)
    place(ledger, 0, (Span("w0", 0, 32),))
    for _ in range(1000):
        calibration.observe("w0", window(1600 * CURVE.decode(1, 16) * times, 1600, 0))
    assert model.of("w0").step == pytest.approx(CURVE.step * (MOST if times > 1 else 1 / MOST), rel=0.01)


def test_workers_that_were_not_timed_are_not_followed_and_lost_ones_are_forgotten(ledger: Ledger) -> None:
    calibration = Calibration(ledger)
    calibration.observe("w0", window(9.0, 9, 0))  # before any model is known
    model = calibration.follow(MODEL)
    for sequence, worker in enumerate(("w0", "w2")):
        place(ledger, sequence, (Span(worker, 0, 32),))
        calibration.observe(worker, window(9.0, 9, sequence))
        calibration.observe(worker, WindowResult({}, {}, 0, 0.0))
    assert calibration.slower("w2") == 1.0
    assert model.of("w2") == CURVE
    slow = calibration.slower("w0")
    assert slow > 2
    assert calibration.follow(MODEL).of("w0").step == pytest.approx(slow * CURVE.step), "another worker got ready"
    calibration.forget_worker("w0")
    assert calibration.follow(MODEL).of("w0") == CURVE
