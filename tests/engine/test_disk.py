"""KV that makes room is written to the workers' disks and restored: the same tokens, wherever it is restored."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from distributed import Client, LocalCluster, Scheduler, Worker

from distkv_dask import Engine, SamplingParams
from distkv_dask.worker.blocks.files import BlockFiles
from tests._cluster import PROTOCOL, engine_test
from tests._models import block_bytes, model_dir, prompt_ids, reference_generate

SMALL: dict[str, Any] = {"dtype": "float32", "block_tokens": 8, "prefill_chunk_tokens": 32, "host_memory": 0}
GREEDY = SamplingParams(max_new_tokens=10, ignore_eos=True)
DOCUMENTS = [prompt_ids(100, seed=4), prompt_ids(120, seed=1)]
QUESTION = prompt_ids(5, seed=5)


def engine_of(client: Client, blocks: int, **settings: Any) -> Engine:
    return Engine(
        client, str(model_dir("llama-gqa")), kv_memory=blocks * block_bytes("llama-gqa"), **(SMALL | settings)
    )


def reference(prompt: list[int], new: int) -> list[int]:
    return reference_generate(model_dir("llama-gqa"), [prompt], new)[0].tokens


def files_on(workers: tuple[Worker, ...]) -> list[Path]:
    return [file for worker in workers for file in Path(worker.local_directory).glob("distkv-*/*.arrow")]


@pytest.mark.parametrize("damage", ["none", "a byte", "a file"])
def test_documents_take_turns_in_memory_and_answer_alike(damage: str) -> None:
    expected = [reference(document + QUESTION, 10) for document in DOCUMENTS]

    @engine_test(3)
    async def run(client: Client, scheduler: Scheduler, *workers: Worker) -> None:
        async with engine_of(client, 7) as engine:
            documents = [await engine.ingest(ids) for ids in DOCUMENTS]
            before = (await engine.status()).totals["prefilled_tokens"]
            for turn in range(6):
                at = turn % 2
                if damage != "none" and turn == 4:
                    file = next(
                        one for one in files_on(workers) if one.name.startswith(f"blocks-{documents[0].number}-")
                    )
                    if damage == "a file":
                        file.unlink()
                    else:
                        data = bytearray(file.read_bytes())
                        data[len(data) // 2] ^= 1
                        file.write_bytes(data)
                done = await documents[at].ask(QUESTION, GREEDY)
                assert list(done.token_ids) == expected[at], (turn, done)
            status = await engine.status()
            anew = status.totals["prefilled_tokens"] - before
            assert (anew > 6 * 12) == (damage != "none"), "documents come back from disk, if that is whole"
            assert status.totals["spill_events"] >= 2
            assert status.totals["restore_events"] >= 4
            for file in files_on(workers):
                assert (file.stat().st_mode & 0o777, file.parent.stat().st_mode & 0o777) == (0o600, 0o700)
            disks = {worker: one.disk_bytes for worker, one in status.workers.items()}
            for worker in workers:
                size = sum(file.stat().st_size for file in files_on((worker,)))
                assert disks[worker.address] <= size < disks[worker.address] * 1.2 + 5000
            for document in documents:
                await document.release()
            while files_on(workers):  # deletions are not acknowledged; the test has a time limit
                await asyncio.sleep(0.02)
            assert not any(one.disk_bytes for one in (await engine.status()).workers.values())
        assert not [one for worker in workers for one in Path(worker.local_directory).glob("distkv-*")]

    run()


def test_a_document_comes_back_to_another_worker_than_it_left(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = reference(DOCUMENTS[0] + QUESTION, 10)
    asked: list[int] = []
    rows = BlockFiles.rows

    async def counted(files: BlockFiles, file: Any, first: int, count: int) -> Any:
        asked.append(count)
        return await rows(files, file, first, count)

    monkeypatch.setattr(BlockFiles, "rows", counted)

    @engine_test(2)
    async def run(client: Client, scheduler: Scheduler, *workers: Worker) -> None:
        async with engine_of(client, 18, window_steps=4) as engine:
            document = await engine.ingest(DOCUMENTS[0])
            (left,) = {span.worker for span in document.placement}
            await engine.generate([prompt_ids(250, seed=8)], GREEDY)  # needs both workers
            # the plain request's KV may also be on disks by now
            own = [file for file in files_on(workers) if file.name.startswith(f"blocks-{document.number}-")]
            assert {file.parents[1] for file in own} == {
                Path(worker.local_directory) for worker in workers if worker.address == left
            }
            before = (await engine.status()).totals["prefilled_tokens"]
            scheduler.plugins["distkv"].engines[engine.id].life.ledger.retire_worker(left)  # no new blocks go there
            done = await document.ask(QUESTION, GREEDY)
            assert list(done.token_ids) == expected
            assert (await engine.status()).totals["prefilled_tokens"] - before == 9, "only the question was computed"

    run()
    assert sum(asked) > 0, "blocks were asked of the worker that has them"


@engine_test(2)
async def test_an_urgent_request_is_answered_first_and_the_other_goes_on(
    client: Client, scheduler: Scheduler, *workers: Worker
) -> None:
    prompts = prompt_ids(200, seed=2), prompt_ids(40, seed=3)
    async with engine_of(client, 20, window_steps=4) as engine:
        first = engine.submit(prompts[0], SamplingParams(max_new_tokens=100, ignore_eos=True))
        while not any(one.generated_tokens for one in (await engine.status()).sequences.values()):
            await asyncio.sleep(0.01)
        urgent = await engine.submit(prompts[1], SamplingParams(max_new_tokens=8, ignore_eos=True, priority=1))
        assert not first.done()
        done = await first
        totals = (await engine.status()).totals
    assert list(urgent.token_ids) == reference(prompts[1], 8)
    assert list(done.token_ids) == reference(prompts[0], 100)
    assert totals["spill_events"] == totals["restore_events"] == 2, "it lay on both workers"
    assert totals["prefilled_tokens"] == 240, "nothing was computed twice"


@pytest.mark.slow
def test_a_request_whose_disk_is_killed_with_its_worker_is_answered_all_the_same() -> None:
    prompts = prompt_ids(60, seed=2), prompt_ids(40, seed=3)
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, protocol=PROTOCOL, dashboard_address=None) as cluster,
        Client(cluster) as client,
        engine_of(client, 20, window_steps=4) as engine,
    ):
        first = engine.submit(prompts[0], SamplingParams(max_new_tokens=240, ignore_eos=True))
        deadline = time.monotonic() + 60
        while not any(one.generated_tokens for one in engine.status().sequences.values()):
            assert time.monotonic() < deadline
            time.sleep(0.02)  # each status costs the scheduler as much as a step
        urgent = engine.submit(prompts[1], SamplingParams(max_new_tokens=200, ignore_eos=True, priority=1))
        while (status := engine.status()).sequences[0].state != "waiting":
            assert time.monotonic() < deadline, status
            time.sleep(0.02)
        disks = {worker for worker, one in status.workers.items() if one.disk_bytes}
        assert disks
        os.kill(client.run(os.getpid, workers=[worker := min(disks)])[worker], signal.SIGKILL)
        assert list(urgent.result(timeout=90).token_ids) == reference(prompts[1], 200)
        assert list(first.result(timeout=90).token_ids) == reference(prompts[0], 240)
