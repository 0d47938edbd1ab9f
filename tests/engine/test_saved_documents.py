"""Documents in files: the same tokens after loading on other workers; damaged or foreign files are refused."""

from __future__ import annotations

import json
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from distributed import Client, LocalCluster, Scheduler, Worker

from distkv_dask import Engine, EngineClosedError, SamplingParams, SavedDocumentError
from tests._cluster import PROTOCOL, engine_test, until_idle
from tests._models import block_bytes, model_dir, prompt_ids, reference_generate
from tests._processes import freeze

SMALL = {"dtype": "float32", "block_tokens": 8, "prefill_chunk_tokens": 32}
GREEDY = SamplingParams(max_new_tokens=10, ignore_eos=True)
DOCUMENT = prompt_ids(100, seed=4)
QUESTIONS = [prompt_ids(length, seed=length) for length in (1, 5, 30)]


def engine_of(client: Client, blocks: int, **settings: Any) -> Engine:
    kind = settings.pop("model", "llama-gqa")
    return Engine(client, str(model_dir(kind)), kv_memory=blocks * block_bytes(kind), **(SMALL | settings))


def wanted() -> list[list[int]]:
    prompts = [DOCUMENT + question for question in QUESTIONS]
    return [reference_generate(model_dir("llama-gqa"), [prompt], 10)[0].tokens for prompt in prompts]


def save(place: str | Path, workers: int = 3) -> None:
    """Save the document from workers that are too small to hold it alone."""

    @engine_test(workers=workers)
    async def run(client: Client, scheduler: Scheduler, *them: Worker) -> None:
        async with engine_of(client, 9) as engine, await engine.ingest(DOCUMENT, name="hundred") as document:
            await document.save(place)

    run()


@pytest.mark.parametrize("place", ["path", "file://", "memory://"])
@pytest.mark.parametrize("workers", [1, 4])
def test_a_document_gives_the_same_tokens_after_loading_on_another_number_of_workers(
    workers: int, place: str, tmp_path: Path
) -> None:
    folder = {
        "path": str(tmp_path / "saved"),
        "file://": f"file://{tmp_path}/saved",
        "memory://": f"memory://{tmp_path}",
    }
    save(folder[place])
    if place != "memory://":
        assert len(list((tmp_path / "saved").glob("blocks-*.arrow"))) > 1, "one file from each worker"
    expected = wanted()

    @engine_test(workers=workers)
    async def run(client: Client, scheduler: Scheduler, *them: Worker) -> None:
        async with engine_of(client, 30 if workers == 1 else 8) as engine:
            document = await engine.load(folder[place])
            assert engine.documents() == {"hundred": document}
            assert (await engine.status()).totals.get("prefilled_tokens", 0) == 0, "nothing was computed"
            done = await document.ask(QUESTIONS, GREEDY)
            assert [list(one.token_ids) for one in done] == expected
            assert [one.reused_tokens for one in done] == [96] * 3
            await document.release()
            await until_idle(engine)

    run()


@engine_test(workers=2)
async def test_saving_again_replaces_what_was_there(client: Client, scheduler: Scheduler, *workers: Worker) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        async with engine_of(client, 40) as engine:
            first, second = await engine.ingest(DOCUMENT), await engine.ingest(DOCUMENT[:50])
            await first.save(folder)
            await second.save(folder)
            assert {path.suffix for path in Path(folder).iterdir()} == {".json", ".arrow"}
            files = json.loads((Path(folder) / "document.json").read_text())["files"]
            assert {file[0] for file in files} == {path.name for path in Path(folder).glob("blocks-*")}
            loaded = await engine.load(folder, name="again")
            assert loaded.ids == DOCUMENT[:50]
            await second.release()
            with pytest.raises(EngineClosedError, match="released"):
                await second.save(folder)


@engine_test(workers=2)
async def test_a_document_given_up_for_room_comes_back_from_its_files_or_its_tokens(
    client: Client, scheduler: Scheduler, *workers: Worker
) -> None:
    import tempfile

    expected = wanted()
    with tempfile.TemporaryDirectory() as folder:
        async with engine_of(client, 10) as engine:
            document = await engine.ingest(DOCUMENT)
            await document.save(folder)
            for damaged in (False, True):
                other = await engine.ingest(prompt_ids(120, seed=1))
                computed = (await engine.status()).totals.get("prefilled_tokens", 0)
                assert (await engine.status()).sequences[document.number].state == "dropped"
                if damaged:
                    for file in Path(folder).glob("blocks-*"):
                        file.unlink()
                done = await document.ask(QUESTIONS[1], GREEDY)
                assert list(done.token_ids) == expected[1]
                more = (await engine.status()).totals.get("prefilled_tokens", 0) - computed
                assert more == (96 + 9 if damaged else 9)
                await other.release()


def damage_metadata(folder: Path) -> None:
    file = folder / "document.json"
    file.write_text(file.read_text().replace('"ids": [', '"ids": [7, '))


def damage_block(folder: Path) -> None:
    file = sorted(folder.glob("blocks-*"))[-1]
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def truncate_block(folder: Path) -> None:
    file = sorted(folder.glob("blocks-*"))[0]
    file.write_bytes(file.read_bytes()[:-1000])


DAMAGES: dict[str, tuple[Any, dict[str, Any], str]] = {
    "no document": (lambda folder: (folder / "document.json").unlink(), {}, "no .complete. document"),
    "cut metadata": (lambda f: (f / "document.json").write_text((f / "document.json").read_text()[:-9]), {}, "damaged"),
    "changed metadata": (damage_metadata, {}, "damaged"),
    "a damaged block": (damage_block, {}, "damaged"),
    "a truncated file": (truncate_block, {}, "truncated"),
    "a missing file": (lambda folder: sorted(folder.glob("blocks-*"))[0].unlink(), {}, "is not in"),
    "another model": (lambda folder: None, {"model": "qwen3"}, "another model"),
    "another dtype": (lambda folder: None, {"dtype": "bfloat16"}, "dtype='float32'"),
    "other blocks": (lambda folder: None, {"block_tokens": 16}, "block_tokens=8"),
}


def test_what_is_damaged_or_of_another_model_is_refused_with_the_reason(tmp_path: Path) -> None:
    import shutil

    save(tmp_path / "whole", workers=2)

    @engine_test(workers=2)
    async def run(client: Client, scheduler: Scheduler, *them: Worker) -> None:
        for name, (damage, settings, words) in DAMAGES.items():
            folder = tmp_path / name
            shutil.copytree(tmp_path / "whole", folder)
            damage(folder)
            async with engine_of(client, 40, **settings) as engine:
                with pytest.raises(SavedDocumentError, match=words):
                    await engine.load(folder)
                assert engine.documents() == {}
                await until_idle(engine)
        async with engine_of(client, 40) as engine:
            document = await engine.load(tmp_path / "whole")
            with pytest.raises(SavedDocumentError, match="not a place"):
                await document.save("nowhere://at/all")
            (tmp_path / "a file").write_text("")
            with pytest.raises(SavedDocumentError, match=r"cannot be created|could not be written"):
                await document.save(tmp_path / "a file")

    run()


@pytest.mark.slow
def test_a_worker_that_dies_while_it_saves_costs_the_document_nothing(tmp_path: Path) -> None:
    with (
        LocalCluster(n_workers=3, threads_per_worker=1, protocol=PROTOCOL, dashboard_address=None) as cluster,
        Client(cluster) as client,
        engine_of(client, 9) as engine,
    ):
        document = engine.ingest(DOCUMENT, name="hundred")
        victim = document.placement[0].worker
        process = client.run(os.getpid, workers=[victim])[victim]
        freeze(process)  # so that it dies with its part unwritten
        with ThreadPoolExecutor(1) as pool:
            saving = pool.submit(document.save, tmp_path / "saved")
            deadline = time.monotonic() + 60
            while not any(one.state == "saving" for one in engine.status().sequences.values()):
                assert time.monotonic() < deadline
                time.sleep(0.05)
            os.kill(process, signal.SIGKILL)
            saving.result(120)
        assert engine.status().totals["loss_events"] == 1
        document.release()
        loaded = engine.load(tmp_path / "saved")
        assert [list(loaded.ask(question, GREEDY).token_ids) for question in QUESTIONS] == wanted()
