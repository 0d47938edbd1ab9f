"""Workers time themselves when an engine opens, and leave nothing behind by that."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from _channels import TCP, UNIX, Way
from _fakes import Member, loaded

from distkv_dask.config import Config
from distkv_dask.geometry import Measurement
from distkv_dask.messages.names import EngineSpec
from distkv_dask.worker.timing.measurement import measure
from distkv_dask.worker.timing.measurement_cache import cached_measurement

TIMED = Measurement(((1, 8, 0.1),), ((32, 0, 0.2),), ((8, 0.3),), 0.4)


@pytest.mark.parametrize("way", [TCP, UNIX], ids=lambda way: way.name)
def test_a_worker_times_steps_prompts_and_an_exchange_and_its_pool_is_as_before(way: Way) -> None:
    model = loaded("llama-gqa")
    spec = EngineSpec("engine", "", "float32", "a token", Config.load(channel=way.channel))
    member = Member("w0", model, 100, 8, spec, way)
    try:
        found = measure("engine", model.geometry, member.runtime, member.lanes, has_model=True)
        assert found is not None
        assert {batch for batch, _, _ in found.decode} == {1, 8}
        assert max(tokens for _, tokens, _ in found.decode) > 500
        assert all(seconds > 0 for *_, seconds in (*found.decode, *found.prompt))
        assert [before > 0 for _, before, _ in found.prompt] == [False, True]
        assert found.exchange is not None
        assert found.exchange >= 0
        assert member.pool.used_blocks == 0
        assert [tokens for tokens, _ in found.attention] == [8, 640]
        memory = measure("engine", model.geometry, member.runtime, member.lanes, has_model=False)
        assert memory is not None
        assert [tokens for tokens, _ in memory.attention] == [8, 640]
        assert member.pool.used_blocks == 0
    finally:
        member.close()


def test_a_pool_too_small_to_time_anything_is_left_alone() -> None:
    model = loaded("llama-gqa")
    member = Member("w0", model, 3, 8, EngineSpec("engine", "", "float32", "a token", Config.load(channel="tcp")), TCP)
    try:
        assert measure("engine", model.geometry, member.runtime, member.lanes, has_model=True) is None
    finally:
        member.close()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "distkv-dask" / "performance"


def never() -> Measurement:
    raise AssertionError("it was measured although it is known")


def test_what_was_measured_once_is_read_again_whole_and_other_hardware_is_measured_anew(cache: Path) -> None:
    assert cached_measurement({"cores": 2}, "auto", lambda: TIMED) == TIMED
    assert cached_measurement({"cores": 2}, "auto", never) == TIMED
    other = Measurement(exchange=None)
    assert cached_measurement({"cores": 4}, "auto", lambda: other) == other
    assert cached_measurement({"cores": 4}, "auto", never) == other
    assert cached_measurement({"cores": 2}, "measure", lambda: other) == other
    assert cached_measurement({"cores": 2}, "auto", never) == other
    assert cached_measurement({"cores": 2}, "preset", never) is None
    assert len(list(cache.iterdir())) == 2


@pytest.mark.parametrize("content", ["", "{", "[]", '{"measured": {"decode": [[1]]}}'])
def test_a_damaged_cache_is_replaced_and_one_that_cannot_be_written_costs_no_more_than_time(
    content: str, cache: Path
) -> None:
    cached_measurement({}, "auto", lambda: TIMED)
    (file,) = cache.iterdir()
    file.write_text(content)
    assert cached_measurement({}, "auto", lambda: TIMED) == TIMED
    assert json.loads(file.read_text())["measured"]["exchange"] == 0.4
    file.unlink()
    cache.rmdir()
    cache.touch()
    assert cached_measurement({}, "auto", lambda: TIMED) == TIMED
