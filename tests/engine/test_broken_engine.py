"""A fault in an engine's state machine ends that engine, and nothing else."""

from __future__ import annotations

import asyncio

import pytest
from _cluster import engine_test
from _models import model_dir, reference_generate
from distributed import Client, Scheduler, Worker

from distkv_dask import Engine, EngineClosedError, SamplingParams
from distkv_dask.scheduler.work import homes

PROMPT, NEW = [3, 1, 4, 1, 5, 9], 300


@pytest.mark.parametrize("when", ["while it decodes", "when it is asked"])
def test_a_fault_in_the_state_machine_ends_its_engine_with_a_reason_and_no_other(
    when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (expected,) = reference_generate(model_dir("llama-gqa"), [PROMPT], 8)
    fill, broken = homes.fill, ""

    def faulty(life: homes.MachineState) -> None:
        decodes = any(request.generated for request in life.requests.values())
        if life.engine == broken and (decodes if when == "while it decodes" else len(life.requests) > 1):
            raise ValueError("a fault of ours")
        fill(life)

    monkeypatch.setattr(homes, "fill", faulty)

    @engine_test(workers=2)
    async def run(client: Client, scheduler: Scheduler, *workers: Worker) -> None:
        nonlocal broken
        model = str(model_dir("llama-gqa"))
        each = {"kv_memory": "32 MiB"}  # of two on the same card
        async with Engine(client, model, **each) as other, Engine(client, model, **each) as engine:
            broken = engine.id
            sampling = SamplingParams(max_new_tokens=NEW, ignore_eos=True)
            asked = [engine.submit(PROMPT, sampling)]
            if when == "when it is asked":
                while not (await engine.status()).sequences:
                    await asyncio.sleep(0.001)
                asked.append(engine.submit(PROMPT, sampling))
            for one in asked:
                with pytest.raises(EngineClosedError, match=r"broken.*a fault of ours"):
                    await asyncio.wait_for(one, 30)
            (done,) = await other.generate([PROMPT], SamplingParams(max_new_tokens=8, ignore_eos=True))
            assert list(done.token_ids) == expected.tokens
        plugins = [one.plugins["distkv"] for one in (scheduler, *workers)]
        for _ in range(3000):  # it closes by itself, once its tasks have ended
            if not any(plugin.engines for plugin in plugins):
                break
            await asyncio.sleep(0.02)
        assert not any(plugin.engines for plugin in plugins)

    run()
