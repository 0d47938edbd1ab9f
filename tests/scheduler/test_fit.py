"""Measurements of workers become the performance model that policies use."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from distkv_dask.config import Config
from distkv_dask.geometry import Geometry, Measurement
from distkv_dask.scheduler.costs.fit import fit_curve, fit_model
from distkv_dask.scheduler.costs.model import Curve, PerformanceModel
from distkv_dask.scheduler.costs.presets import PRESET
from distkv_dask.scheduler.records.machine_state import MachineState

GEOMETRY = Geometry(10, 8, 2, 64, 1000, 4096, "bfloat16")
SLOW = Curve(step=0.04, row=0.002, token=3e-6, prompt=0.001, pair=2e-7)
FAST = Curve(step=0.01, row=0.001, token=1e-6, prompt=0.0005, pair=1e-7)


def timed(curve: Curve, exchange: float | None = None, noise: float = 0.0) -> Measurement:
    """Measurements of a worker with this speed, with some noise in the longest step."""
    return Measurement(
        tuple((b, t, curve.decode(b, t) - noise * (t > 512)) for b, t in ((1, 64), (8, 512), (1, 4096), (8, 4096))),
        ((128, 0, curve.prefill(128)), (128, 4096, curve.prefill(128, 4096))),
        tuple((tokens, 1e-4 + tokens * curve.token) for tokens in (64, 4096)),
        exchange=exchange,
    )


def close_to(curve: Curve, other: Curve) -> bool:
    names = ("step", "row", "token", "prompt", "pair")
    return all(getattr(curve, name) == pytest.approx(getattr(other, name), rel=1e-6) for name in names)


def test_a_curve_is_found_again_from_what_it_gives() -> None:
    assert close_to(fit_curve(timed(SLOW), PRESET.curve), SLOW)


def test_attention_is_known_also_where_a_step_was_timed_when_the_machine_happened_to_be_fast() -> None:
    found = fit_curve(timed(FAST, noise=4096 * FAST.token), PRESET.curve)
    assert found.token == pytest.approx(FAST.token)
    assert found.decode(8, 4096) == pytest.approx(FAST.decode(8, 4096), rel=0.15)


def test_a_curve_is_fitted_to_steps_alone_where_attention_was_not_timed() -> None:
    assert close_to(fit_curve(replace(timed(SLOW), attention=()), PRESET.curve), SLOW)


def test_unequal_workers_have_their_own_curves_and_memory_workers_attend_only() -> None:
    memory = Measurement(attention=((64, 1e-3 + 64 * 5e-6), (4096, 1e-3 + 4096 * 5e-6)))
    given = {"memory": memory, "slow": timed(SLOW, 0.004), "fast": timed(FAST, 0.002), "untimed": None}
    model = fit_model(GEOMETRY, given, PRESET)
    assert close_to(model.of("slow"), SLOW)
    assert close_to(model.of("fast"), FAST)
    assert close_to(model.of("untimed"), SLOW), "the first that was measured stands in"
    assert model.of("memory").token == pytest.approx(5e-6)
    assert model.inside.latency * 2 * 10 == pytest.approx(0.003)
    assert model.shape.kv_bytes == 10 * 2 * 2 * 64 * 2


def test_without_any_measurement_the_preset_stays_but_for_the_models_sizes() -> None:
    model = fit_model(GEOMETRY, {"w0": None}, PRESET)
    assert model.curve == PRESET.curve
    assert model.inside == PRESET.inside
    assert model.shape.layers == 10


@pytest.mark.parametrize("policy", ["best", "greedy"])
def test_policies_decide_by_what_was_measured(policy: str) -> None:
    life = MachineState("engine", Config.load(policy=policy), itertools.count(1))
    model = fit_model(GEOMETRY, {"w0": timed(SLOW)}, PRESET)
    life.know_costs(model)
    assert life.policy.model == model


def test_a_split_context_takes_as_long_as_its_slowest_part() -> None:
    model = PerformanceModel(PRESET.shape, FAST, PRESET.inside, PRESET.between, {"slow": SLOW})
    alone = model.step("fast", 1, 8000, {})
    assert alone == pytest.approx(FAST.decode(1, 8000))
    apart = model.step("fast", 1, 4000, {"slow": (1, 4000)})
    assert apart == pytest.approx(FAST.decode(1, 0) + 4000 * SLOW.token + model.exchange(model.inside, 1))
    assert model.step("fast", 1, 8000, {"slow": (1, 100)}) == pytest.approx(alone + model.exchange(model.inside, 1))
