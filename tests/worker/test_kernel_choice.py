"""Attention kernels of a worker: measured by a machine's first one, read by the others, and shown in the status."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from distributed import Client, Scheduler, Worker

from distkv_dask import Engine, SamplingParams
from distkv_dask.config import Config
from distkv_dask.errors import ConfigError
from distkv_dask.kernels import native_kernel
from distkv_dask.kernels.instruction_sets import SetTimes
from distkv_dask.worker.timing import kernel_choice
from distkv_dask.worker.timing.kernel_choice import choose_kernels
from tests._cluster import about_the_host, engine_test
from tests._models import model_dir, prompt_ids, reference_generate

pytestmark = pytest.mark.skipif(native_kernel.missing() is not None, reason="no C++ core here")
SETS = native_kernel.instruction_sets() if native_kernel.missing() is None else []
DECODES = native_kernel.instruction_sets(torch.bfloat16, many=False) if SETS else []
"""Sets that serve few queries themselves; tiles leave these to another set."""
POOL: Any = SimpleNamespace(
    device=SimpleNamespace(torch=torch.device("cpu")), dtype=torch.bfloat16, head_dim=64, block_tokens=64
)
AUTO = Config.load(performance="auto")


def times(seconds: float, second: float = 1.0) -> SetTimes:
    """The last set is the fastest for few queries, the first for many.

    The second best time of the last set for few queries is ``second`` times its best one.
    """
    last = dict.fromkeys(SETS, (2 * seconds, 2 * seconds)) | {SETS[-1]: (seconds, second * seconds)}
    first = dict.fromkeys(SETS, (2 * seconds, 2 * seconds)) | {SETS[0]: (seconds, seconds)}
    return SetTimes(last, first, 10**9, 10**9)


class Machine:
    """Replaces time_sets: its results for each call, and the known times that it was given."""

    def __init__(self, *found: SetTimes) -> None:
        self.found, self.known = list(found), list[SetTimes | None]()

    def __call__(self, dtype: torch.dtype, known: SetTimes | None) -> SetTimes:
        self.known.append(known)
        return self.found[len(self.known) - 1]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    new_process(monkeypatch)
    yield tmp_path / "distkv-dask" / "performance"
    native_kernel.serve_with(torch.bfloat16, few="", many="")


def new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_choice, "_times", {})


def timed_by(monkeypatch: pytest.MonkeyPatch, *found: SetTimes) -> Machine:
    machine = Machine(*found)
    monkeypatch.setattr(kernel_choice, "time_sets", machine)
    return machine


def test_the_first_worker_measures_and_later_ones_read(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = timed_by(monkeypatch, times(0.1))
    for _ in range(2):
        new_process(monkeypatch)
        name, reason = choose_kernels(POOL, AUTO)
        assert name == f"native, decode {SETS[-1]}, prefill {SETS[0]}"
        assert f"{SETS[-1]} 10.0" in reason
        assert native_kernel.serving(torch.bfloat16) == (SETS[-1], SETS[0])
    assert machine.known == [None]


def test_workers_that_open_at_once_measure_once(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = []

    def slow(*_: Any) -> SetTimes:
        measured.append(1)
        time.sleep(0.1)
        return times(0.1)

    monkeypatch.setattr(kernel_choice, "time_sets", slow)
    with ThreadPoolExecutor(4) as executor:  # each like a separate process
        list(executor.map(lambda _: kernel_choice._measured(torch.bfloat16, "auto"), range(4)))
    assert measured == [1]


def test_times_of_a_busy_moment_are_taken_again_until_they_come_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    busy, better, calm = times(0.3, 1.5), times(0.2, 1.5), times(0.1)
    machine = timed_by(monkeypatch, busy, better, calm)
    for _ in range(5):
        new_process(monkeypatch)
        choose_kernels(POOL, AUTO)
    assert machine.known == [None, busy, better]


def test_a_process_keeps_its_choice_while_engines_may_be_open(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = timed_by(monkeypatch, times(0.1, 1.5), times(0.1))
    assert choose_kernels(POOL, AUTO) == choose_kernels(POOL, Config.load(performance="measure"))
    assert machine.known == [None]


@pytest.mark.parametrize("days", [29, 31])
def test_after_a_month_a_machine_is_measured_again(days: int, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = timed_by(monkeypatch, times(0.1), times(0.2))
    choose_kernels(POOL, AUTO)
    (file,) = cache.glob("*.json")
    os.utime(file, (0, time.time() - days * 24 * 3600))
    new_process(monkeypatch)
    choose_kernels(POOL, AUTO)
    assert machine.known == [None] * (1 if days < 30 else 2)


@pytest.mark.parametrize(
    "measured",
    [{}, {"few": {}, "many": {}, "work": [1, 1]}, {"few": {"mmx": [1, 1]}, "many": {"mmx": [1, 1]}, "work": [1, 1]}],
)
def test_what_another_machine_has_kept_is_not_believed(
    measured: dict[str, Any], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = timed_by(monkeypatch, times(0.1), times(0.1))
    choose_kernels(POOL, AUTO)
    (file,) = cache.glob("*.json")
    file.write_text(json.dumps({"measured": measured}))
    new_process(monkeypatch)
    assert choose_kernels(POOL, AUTO).name == f"native, decode {SETS[-1]}, prefill {SETS[0]}"
    assert machine.known == [None, None]


def test_without_a_folder_for_it_every_worker_measures(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = timed_by(monkeypatch, times(0.1), times(0.1))
    cache.parent.touch()
    for _ in range(2):
        new_process(monkeypatch)
        assert choose_kernels(POOL, AUTO).name == f"native, decode {SETS[-1]}, prefill {SETS[0]}"
    assert machine.known == [None, None]


def test_settings_come_before_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = timed_by(monkeypatch, times(0.1))
    name, reason = choose_kernels(POOL, Config.load(performance="auto", instruction_set="portable"))
    assert (name, reason) == ("native, decode portable, prefill portable", "distkv.instruction-set names it")
    assert native_kernel.serving(torch.bfloat16) == ("portable", "portable")
    preset = choose_kernels(POOL, Config.load(performance="preset"))
    assert preset.name == f"native, decode {DECODES[0]}, prefill {SETS[0]}"
    assert machine.known == []
    assert choose_kernels(POOL, AUTO).name == f"native, decode {SETS[-1]}, prefill {SETS[0]}"


def test_an_instruction_set_that_is_not_there_is_told_with_those_that_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_kernel, "instruction_sets", lambda: ["portable"])
    config = SimpleNamespace(instruction_set="avx9", performance="auto")
    with pytest.raises(ConfigError, match=r"distkv.instruction-set: .*\['portable'\].* 'avx9'.*Set it to auto"):
        choose_kernels(POOL, config)  # type: ignore[arg-type]


@about_the_host("instruction sets are those of the host's processor")
@engine_test(workers=2)
async def test_an_engine_uses_the_set_that_was_named_and_says_so(
    client: Client, scheduler: Scheduler, *workers: Worker
) -> None:
    prompts = [prompt_ids(length, seed=length) for length in (70, 5)]
    expected = reference_generate(model_dir("llama-gqa"), prompts, 8)
    settings = {"dtype": "float32", "kv_memory": "1 MiB", "block_tokens": 8, "instruction_set": "portable"}
    async with Engine(client, str(model_dir("llama-gqa")), **settings) as engine:
        done = await engine.generate(prompts, SamplingParams(max_new_tokens=8, ignore_eos=True))
        assert [list(one.token_ids) for one in done] == [one.tokens for one in expected]
        assert native_kernel.serving(torch.float32) == ("portable", "portable")
        told = {one.kernels for one in (await engine.status()).workers.values()}
    assert told == {"native, decode portable, prefill portable: distkv.instruction-set names it"}
    native_kernel.serve_with(torch.float32, few="", many="")
