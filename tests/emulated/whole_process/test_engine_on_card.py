"""A whole engine on the card: its reported device, the size of its KV memory, what it refuses, and its tokens."""

from __future__ import annotations

import emulated
import pytest
import torch
from distributed import Client, Scheduler, Worker

from distkv_dask import Engine, SamplingParams
from distkv_dask.errors import DeviceError
from tests._cluster import engine_test
from tests._models import block_bytes, model_dir, prompt_ids, reference_generate

NEW = 6
GREEDY = SamplingParams(max_new_tokens=NEW, ignore_eos=True)
SMALL = {"dtype": "float32", "block_tokens": 8, "prefill_chunk_tokens": 32, "device": "cuda"}
MODEL = str(model_dir("qwen3"))


def test_documents_that_fit_on_no_card_are_answered_and_come_back_from_files(tmp_path) -> None:
    document, question = prompt_ids(150, seed=4), prompt_ids(9, seed=5)
    (expected,) = reference_generate(model_dir("qwen3"), [document + question], NEW)

    @engine_test(workers=2, memory=1)
    async def run(client: Client, scheduler: Scheduler, *workers: Worker) -> None:
        async with Engine(client, MODEL, kv_memory=12 * block_bytes("qwen3"), **SMALL) as engine:
            status = await engine.status()
            assert {one.device for one in status.workers.values()} == {"Emulated GPU"}
            kept = await engine.ingest(document)
            answer = await kept.ask(question, GREEDY)
            assert list(answer.token_ids) == expected.tokens
            assert len({span.worker for span in answer.placement}) > 1
            await kept.save(str(tmp_path / "kept"))
            await kept.release()
            again = await engine.load(str(tmp_path / "kept"))
            assert list((await again.ask(question, GREEDY)).token_ids) == expected.tokens

    run()


def test_graphs_can_be_switched_off_and_status_says_so() -> None:
    @engine_test(workers=1)
    async def run(client: Client, scheduler: Scheduler, worker: Worker) -> None:
        async with Engine(client, MODEL, kv_memory=12 * block_bytes("qwen3"), cuda_graphs=False, **SMALL) as engine:
            (one,) = (await engine.status()).workers.values()
            assert "launched by Python, not as CUDA graphs: distkv.cuda-graphs is false" in one.device
            with emulated.counting() as counts:
                (done,) = await engine.generate([prompt_ids(60)], SamplingParams(max_new_tokens=12, ignore_eos=True))
        assert list(done.token_ids) == reference_generate(model_dir("qwen3"), [prompt_ids(60)], 12)[0].tokens
        assert counts.of("replay") == 0

    run()


def test_kv_memory_is_by_default_what_weights_and_a_chunk_leave_free() -> None:
    @engine_test(workers=1)
    async def run(client: Client, scheduler: Scheduler, worker: Worker) -> None:
        free, total = torch.cuda.mem_get_info()
        others = torch.empty(free - (1 << 30), dtype=torch.uint8, device="cuda")  # because filling the rest takes time
        free, total = torch.cuda.mem_get_info()
        async with Engine(client, MODEL, **SMALL) as engine:
            (one,) = (await engine.status()).workers.values()
            left, _ = torch.cuda.mem_get_info()
            assert 0 < left < 2 * 0.05 * total
            assert 0.5 * free < one.capacity_blocks * one.block_bytes < free
            (done,) = await engine.generate([prompt_ids(60)], GREEDY)
        assert list(done.token_ids) == reference_generate(model_dir("qwen3"), [prompt_ids(60)], NEW)[0].tokens
        del others

    run()


REFUSED = {
    r"1099511627776 bytes does not fit Emulated GPU: \d+ of its \d+": {"kv_memory": 1 << 40},
    "CPUs only": {"deterministic": True},
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_a_card_cannot_do_is_refused_with_a_reason(reason: str) -> None:
    @engine_test(workers=1)
    async def run(client: Client, scheduler: Scheduler, worker: Worker) -> None:
        with pytest.raises(DeviceError, match=reason):
            async with Engine(client, MODEL, **(SMALL | {"kv_memory": 1 << 20} | REFUSED[reason])):
                pass

    run()
