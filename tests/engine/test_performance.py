"""An open engine knows the speed of each of its workers, and its policy uses it."""

from __future__ import annotations

from pathlib import Path

import pytest
from distributed import Client, Scheduler, Worker

from distkv_dask import Engine, SamplingParams
from tests._cluster import engine_test
from tests._models import model_dir

SMALL = {"dtype": "float32", "kv_memory": "2 MiB", "block_tokens": 8, "policy": "best"}


@pytest.mark.parametrize("setting", ["auto", "preset"])
def test_status_shows_each_workers_curve_timed_when_the_engine_opened(
    setting: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    @engine_test(workers=2, memory=1)
    async def run(client: Client, scheduler: Scheduler, *workers: Worker) -> None:
        async with Engine(client, str(model_dir("llama-gqa")), performance=setting, **SMALL) as engine:
            status = await engine.status()
            curves = [status.workers[worker.address].performance for worker in workers]
            assert [one.measured for one in curves] == [setting == "auto"] * 3
            (state,) = scheduler.plugins["distkv"].engines.values()
            model = state.life.policy.model
            assert [model.of(worker.address).step for worker in workers] == [one.step for one in curves]
            assert model.shape.kv_bytes == 3 * 2 * 2 * 64 * 4
            if setting == "auto":
                assert curves[0].step > 0
                assert curves[2].step == 0, "a memory worker runs no steps"
                assert status.exchange_seconds >= 0
            done = await engine.generate([[1, 2, 3]], SamplingParams(max_new_tokens=3))
            assert done[0].error is None
            status = await engine.status()
            assert all(one.used_blocks == 0 for one in status.workers.values())
            followed = [one.performance.slower != 1 for one in status.workers.values()]
            assert sum(followed) == (setting == "auto"), "only the home of the request, and only if it was timed"
        kept = list((tmp_path / "distkv-dask").rglob("*.json"))
        assert bool(kept) == (setting == "auto")

    run()


def test_of_requests_that_come_together_the_policy_says_who_is_first() -> None:
    @engine_test(workers=1)
    async def run(client: Client, scheduler: Scheduler, worker: Worker) -> None:
        async with Engine(client, str(model_dir("llama-gqa")), performance="preset", **SMALL) as engine:
            prompts = [[number] * tokens for number, tokens in enumerate((360, 400, 440), 1)]  # two never fit
            done = await engine.generate(prompts, SamplingParams(max_new_tokens=4))
            assert not any(one.error for one in done)
            queued = [one.timings.queued for one in done]
            assert queued == sorted(queued, reverse=True), "the policy is best: what takes longest is first"

    run()
