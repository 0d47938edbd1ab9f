"""Saving and loading with folders that hang, fill up or are hostile: an error, and nothing is lost, left or run."""

from __future__ import annotations

import asyncio
import json
import tempfile
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from distributed import Client, Scheduler, Worker
from fsspec.implementations.memory import MemoryFileSystem

from distkv_dask import Engine, SamplingParams, SavedDocumentError
from distkv_dask.worker.blocks import storage
from tests._cluster import engine_test
from tests._models import block_bytes, model_dir, prompt_ids

SMALL: dict[str, Any] = {"dtype": "float32", "block_tokens": 8, "prefill_chunk_tokens": 32}
DOCUMENTS = [prompt_ids(100, seed=4), prompt_ids(90, seed=5)]
QUESTION = prompt_ids(5, seed=5)


def engine_of(client: Client, blocks: int = 40, **settings: Any) -> Engine:
    return Engine(
        client, str(model_dir("llama-gqa")), kv_memory=blocks * block_bytes("llama-gqa"), **(SMALL | settings)
    )


class Hanging(MemoryFileSystem):  # type: ignore[misc]
    """A service that stops answering calls of some kind."""

    protocol = "hanging"
    store: dict[str, Any] = {}  # noqa: RUF012
    pseudo_dirs = [""]  # noqa: RUF012
    calls: set[str] = set()  # noqa: RUF012
    released = threading.Event()

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        call = f"{'write' if 'w' in mode else 'read'} {path.rsplit('/', 1)[-1]}"
        if any(call.startswith(one) for one in self.calls):
            self.released.wait(60)
            raise OSError("it came back")
        return super()._open(path, mode, **options)


@pytest.fixture
def hanging() -> Iterator[type[Hanging]]:
    fsspec.register_implementation("hanging", Hanging, clobber=True)
    Hanging.released.clear()
    yield Hanging
    Hanging.released.set()
    Hanging.calls.clear()
    Hanging.store.clear()


def test_a_folder_that_hangs_ends_the_call_and_holds_up_nobody(hanging: type[Hanging]) -> None:
    @engine_test(workers=2)
    async def run(client: Client, scheduler: Scheduler, *workers: Worker) -> None:
        async with engine_of(client, timeout_files=3) as engine:
            document = await engine.ingest(DOCUMENTS[0])
            first = list((await document.ask(QUESTION, SamplingParams(max_new_tokens=5))).token_ids)
            await document.save("hanging://good")
            for kind in ("write blocks", "write document.json"):
                hanging.calls.add(kind)
                with pytest.raises(SavedDocumentError, match=r"3 s \(distkv.timeouts.files\)"):
                    await document.save("hanging://good")
                hanging.calls.clear()
            for kind in ("read blocks", "read document.json"):
                hanging.calls.add(kind)
                with pytest.raises(SavedDocumentError, match=r"3 s \(distkv.timeouts.files\)"):
                    await engine.load("hanging://good", name="again")
                hanging.calls.clear()
            assert list((await document.ask(QUESTION, SamplingParams(max_new_tokens=5))).token_ids) == first
            hanging.released.set()
            loaded = await engine.load("hanging://good", name="again")
            assert list((await loaded.ask(QUESTION, SamplingParams(max_new_tokens=5))).token_ids) == first

    run()


@engine_test(workers=2)
async def test_saves_to_one_place_at_once_leave_a_whole_document(
    client: Client, scheduler: Scheduler, *workers: Worker
) -> None:
    async with engine_of(client) as engine:
        documents = [await engine.ingest(ids) for ids in DOCUMENTS]
        for place in ("memory://at-once", None):
            with tempfile.TemporaryDirectory() as folder:
                for _ in range(6):
                    await asyncio.gather(*(document.save(place or folder) for document in documents * 2))
                    loaded = await engine.load(place or folder, name="loaded")
                    assert loaded.ids in DOCUMENTS
                    await loaded.release()
                if place is None:
                    files = json.loads((Path(folder) / "document.json").read_text())["files"]
                    assert {path.name for path in Path(folder).iterdir()} == {
                        "document.json",
                        *(one[0] for one in files),
                    }


def test_a_worker_whose_disk_is_full_leaves_no_files_of_others_either(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write = storage.write_blocks

    def full(pool: Any, sequence: int, start: int, *rest: Any, **options: Any) -> Any:
        if start > 0:
            raise SavedDocumentError("No space left on device")
        return write(pool, sequence, start, *rest, **options)

    @engine_test(workers=3)
    async def run(client: Client, scheduler: Scheduler, *workers: Worker) -> None:
        async with engine_of(client, 9) as engine:
            document = await engine.ingest(DOCUMENTS[0])
            await document.save(tmp_path)
            before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
            with monkeypatch.context() as patch:
                patch.setattr(storage, "write_blocks", full)
                with pytest.raises(SavedDocumentError, match="No space left"):
                    await document.save(tmp_path)
            assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before

    run()


def crafted(folder: Path, extra: list[Any]) -> None:
    """Add fields to every file of a document, like someone who knows the format."""
    body = json.loads((folder / "document.json").read_text())
    body.pop("checksum")
    body["files"] = [[*file, *extra] for file in body["files"]]
    checksum = zlib.crc32(json.dumps(body, sort_keys=True).encode())
    (folder / "document.json").write_text(json.dumps({"checksum": checksum, **body}))


def test_a_document_that_names_a_worker_is_refused_and_that_is_not_called(tmp_path: Path) -> None:
    called: list[Any] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        called.append(writer.get_extra_info("peername"))
        writer.close()

    @engine_test(workers=2)
    async def run(client: Client, scheduler: Scheduler, *workers: Worker) -> None:
        server = await asyncio.start_server(serve, "127.0.0.1")
        address = "tcp://{}:{}".format(*server.sockets[0].getsockname()[:2])
        async with server, engine_of(client) as engine:
            async with await engine.ingest(DOCUMENTS[0]) as document:
                await document.save(tmp_path)
            crafted(tmp_path, [])
            await (await engine.load(tmp_path)).release()
            crafted(tmp_path, [address])
            with pytest.raises(SavedDocumentError, match="damaged"):
                await engine.load(tmp_path)
        assert not called

    run()


@engine_test(workers=1)
async def test_places_that_are_none_are_refused(client: Client, scheduler: Scheduler, *workers: Worker) -> None:
    before = set(Path.cwd().iterdir())
    async with engine_of(client) as engine:
        document = await engine.ingest(DOCUMENTS[0])
        for place in ("", "  ", None, "a\0b"):
            with pytest.raises(SavedDocumentError):
                await document.save(place)
            with pytest.raises(SavedDocumentError):
                await engine.load(place)
    assert set(Path.cwd().iterdir()) == before
