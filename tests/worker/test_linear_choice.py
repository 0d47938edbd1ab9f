"""A linear is served by what was fastest for its numbers of rows, and gives the right product."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from distkv_dask.kernels import few_rows
from distkv_dask.worker.model.packed import ONEDNN, TORCH, Choice
from distkv_dask.worker.timing import linear_choice
from distkv_dask.worker.timing.linear_choice import IN_LAYERS, ROWS, LinearTimes, choice, chosen, fastest, timed

SETS = ["amx_bf16", "avx512"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    new_process()
    yield tmp_path / "distkv-dask" / "performance"
    new_process()


def new_process() -> None:
    linear_choice._chosen.cache_clear()


def times(*fastest_ones: str, others: float = 2.0) -> dict[int, dict[str, float]]:
    """Seconds of all candidates, of which one takes 1 s and all others take longer."""
    names = (TORCH, ONEDNN, *SETS)
    return {
        rows: {name: 1.0 if name == best else others for name in names}
        for rows, best in zip(ROWS, fastest_ones, strict=False)
    }


def test_the_cores_products_serve_up_to_where_a_library_is_faster() -> None:
    found = times("avx512", "amx_bf16", "amx_bf16", TORCH, "amx_bf16", "amx_bf16")
    assert choice(found, SETS) == Choice(((1, "avx512"), (16, "amx_bf16")), alone=16)


def test_they_serve_more_rows_in_layers_where_a_library_is_a_little_faster() -> None:
    found = times("avx512", "avx512", "amx_bf16", TORCH, "amx_bf16", ONEDNN, others=IN_LAYERS)
    found[64]["avx512"] = found[512]["avx512"] = 1.5
    assert choice(found, SETS) == Choice(((4, "avx512"), (512, "amx_bf16")), alone=16)
    found[64]["amx_bf16"] = 1.3
    assert choice(found, SETS) == Choice(((4, "avx512"), (16, "amx_bf16")), alone=16)


def test_a_library_that_is_faster_with_one_row_serves_all() -> None:
    others = [*SETS, TORCH, TORCH, TORCH]
    assert choice(times(ONEDNN, *others, others=1.2), SETS) == Choice(onednn=True)
    assert choice(times(TORCH, *others, others=1.2), SETS) == Choice()
    assert choice({1: {TORCH: 1.0}}, []) == Choice()
    assert choice({}, SETS) == Choice()


def test_the_shortest_time_wins() -> None:
    assert fastest({TORCH: 2.0, ONEDNN: 1.0, "avx512": 3.0}) == ONEDNN


class Machine:
    """Replaces the measurement: what it finds, one after the other, and the known times that it was given."""

    def __init__(self, *found: LinearTimes) -> None:
        self.found, self.known = list(found), list[LinearTimes | None]()

    def __call__(self, known: LinearTimes | None) -> LinearTimes:
        self.known.append(known)
        return self.found[len(self.known) - 1]


def kept_times(best: str, second: float = 1.0) -> LinearTimes:
    """Times in which one candidate is the fastest for all rows; its second best time is ``second`` times its best."""
    return LinearTimes({rows: {TORCH: (2.0, 2.0), ONEDNN: (2.0, 2.0)} | {best: (1.0, second)} for rows in ROWS})


def test_the_first_worker_of_a_machine_measures_and_later_ones_read(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(kept_times(ONEDNN))
    monkeypatch.setattr(linear_choice, "timed", machine)
    for _ in range(3):
        new_process()
        assert chosen() == Choice(onednn=True)
    assert machine.known == [None]


def test_times_of_a_busy_moment_are_taken_again_until_they_come_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    busy, calm = kept_times(TORCH, second=1.5), kept_times(ONEDNN)
    machine = Machine(busy, calm)
    monkeypatch.setattr(linear_choice, "timed", machine)
    found = []
    for _ in range(4):
        new_process()
        found.append(chosen())
    assert found == [Choice(), *[Choice(onednn=True)] * 3]
    assert machine.known == [None, busy]


@pytest.mark.parametrize("content", ["{}", "[", "null", '{"measured": {"rows": {"1": {"torch": [1, 1]}}}}'])
def test_a_file_that_is_no_measurement_is_replaced(content: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_choice, "timed", Machine(*[kept_times(ONEDNN)] * 2))
    chosen()
    (file,) = cache.glob("*.json")
    right = json.loads(file.read_text())
    file.write_text(content)
    new_process()
    assert chosen() == Choice(onednn=True)
    assert json.loads(file.read_text()) == right


def test_known_times_are_kept_where_they_are_better() -> None:
    names = [TORCH, *few_rows.sets()]
    known = LinearTimes({rows: dict.fromkeys(names, (1e-9, 1e-9)) for rows in ROWS})
    found = timed(known)
    assert all(by_name[name] == (1e-9, 1e-9) for by_name in found.by_rows.values() for name in names)
    assert timed(LinearTimes({rows: dict.fromkeys(names, (9.0, 9.0)) for rows in ROWS})).best[1][TORCH] != 9.0


def test_every_candidate_is_timed_and_the_choice_can_be_used() -> None:
    names = {TORCH, *few_rows.sets()}
    assert all(names <= times.keys() and min(times.values()) > 0 for times in timed().best.values())
    found = chosen()
    assert found is chosen()
    assert {name for _, name in found.few} <= set(few_rows.sets())
    weight = torch.randn(64, 64).bfloat16()
    if found.few:
        product = few_rows.FewRows(few_rows.packed(weight), (64, 64), None, found.few)
        rows = torch.randn(1, 64).bfloat16()
        assert torch.allclose(product(rows).double(), rows.double() @ weight.double().T, rtol=1 / 128, atol=1e-2)
