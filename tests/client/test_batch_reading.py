"""Workers read files ahead of their turn; rows come in order, and each error at its row."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from distributed import Client, Scheduler, Worker

from distkv_dask import Engine, InvalidRequestError, SamplingParams, SourceError
from distkv_dask.client.batch import reading
from distkv_dask.client.batch.documents import DocumentSource
from distkv_dask.client.batch.rows import Content, File, Row
from distkv_dask.client.documents import readers
from distkv_dask.client.documents.extract import TextReader
from distkv_dask.client.documents.readers import check_support, way_of
from distkv_dask.errors import MissingProgramError, WorkerLostError
from tests._cluster import engine_test
from tests._models import text_model_dir
from tests._pdf import save_pdf

NOTHING = pa.RecordBatch.from_struct_array(pa.array([{}], pa.struct([])))


class Result:
    """A future of a text, or of an error."""

    def __init__(self, result: Any) -> None:
        self._result = result

    def result(self) -> Any:
        if isinstance(self._result, BaseException):
            raise self._result
        return self._result


class Workers:
    """A session whose workers read files as the test says."""

    asynchronous = False

    def __init__(self, results: dict[bytes, Any]) -> None:
        self.client = self
        self.facts = SimpleNamespace(workers=2)
        self.sent: list[bytes] = []
        self._results = results

    def scatter(self, data: bytes, hash: bool) -> bytes:
        return data

    def submit(self, work: Any, suffix: str, data: bytes, reader: str, pure: bool) -> Result:
        self.sent.append(data)
        return Result(self._results.get(data, f"{data.decode()} read there"))


def row(name: str) -> Row:
    def content(text: str) -> Content:
        return Content({"text": text})

    file = File(".pdf", name.encode(), "auto", content)
    return Row(name, name, NOTHING, lambda: content(f"{name} read here"), file)


def text(one: Row) -> str:
    return str(one.read().values["text"])


def test_rows_keep_their_order_and_questions_and_each_file_is_read_once() -> None:
    workers = Workers({})
    todo = ((one, question) for one in map(row, "abcdef") for question in ("p", "q"))
    found = [(one.label, question, text(one)) for one, question in reading.read_ahead(todo, workers)]  # type: ignore[arg-type]
    assert found == [(name, question, f"{name} read there") for name in "abcdef" for question in ("p", "q")]
    assert workers.sent == [name.encode() for name in "abcdef"]


def test_some_files_are_read_ahead_and_large_ones_not_together(monkeypatch: pytest.MonkeyPatch) -> None:
    workers = Workers({})
    ahead = reading.read_ahead(((row(name), None) for name in "abcdefgh"), workers)  # type: ignore[arg-type]
    assert next(ahead)[0].label == "a"
    assert len(workers.sent) == reading.AT_ONCE * 2
    monkeypatch.setattr(reading, "AHEAD_BYTES", 0)
    workers = Workers({})
    next(reading.read_ahead(((row(name), None) for name in "abcdefgh"), workers))  # type: ignore[arg-type]
    assert len(workers.sent) == 1


def test_an_error_of_the_source_comes_after_the_rows_before_it() -> None:
    def todo() -> Iterator[tuple[Row, str | None]]:
        yield row("a"), None
        yield row("b"), None
        raise SourceError("row c has changed")

    ahead = reading.read_ahead(todo(), Workers({}))  # type: ignore[arg-type]
    assert [text(next(ahead)[0]) for _ in "ab"] == ["a read there", "b read there"]
    with pytest.raises(SourceError, match="row c"):
        next(ahead)


def test_a_file_that_is_no_document_is_its_rows_error_and_one_that_workers_lost_is_read_here() -> None:
    from concurrent.futures import CancelledError

    results = {b"a": InvalidRequestError("damaged"), b"b": RuntimeError("killed"), b"c": CancelledError()}
    results[b"d"] = WorkerLostError("ours")
    rows = [one for one, _ in reading.read_ahead(((row(name), None) for name in "abcd"), Workers(results))]  # type: ignore[arg-type]
    with pytest.raises(InvalidRequestError, match="damaged"):
        text(rows[0])
    assert [text(one) for one in rows[1:3]] == ["b read here", "c read here"]


@engine_test(workers=2)
async def test_a_folder_is_read_by_the_workers_and_a_bad_file_is_an_error_row(
    client: Client, scheduler: Scheduler, *workers: Worker
) -> None:
    pytest.importorskip("selectolax")
    folder = Path(workers[0].local_directory) / "docs"
    folder.mkdir()
    for at in range(4):
        save_pdf(folder / f"{at}.pdf", [f"Page {at}", "The end"])
    (folder / "broken.pdf").write_bytes(b"%PDF-1.7 nothing")
    (folder / "page.html").write_text("<p>One page")
    (folder / "plain.txt").write_text("Plain")
    few = SamplingParams(max_new_tokens=4, ignore_eos=True)
    async with Engine(client, str(text_model_dir()), dtype="float32", kv_memory="8 MiB", block_tokens=8) as engine:
        done = await engine.process(folder, questions=["Who?", "Why?"], out=folder.parent / "out", sampling=few)
        rows = pq.read_table(folder.parent / "out").to_pylist()
        assert (done.rows, done.errors) == (14, 2)
        assert {one["path"] for one in rows if one["error"]} == {"broken.pdf"}
        assert all("the PDF cannot be read" in one["error"] for one in rows if one["error"])
        assert sum(scheduler.task_groups["read_file"].states.values()) == 6, "each file once, and plain text not at all"
        texts = [row.read().values["text"] for row in DocumentSource(folder, "text", [folder / "0.pdf"]).rows()]
        for question in ("Who?", "Why?"):
            (here,) = await engine.generate([[{"role": "user", "content": f"{texts[0]}\n\n{question}"}]], few)
            (there,) = (one for one in rows if (one["path"], one["question"]) == ("0.pdf", question))
            assert there["answer"] == here.text


def test_a_reader_that_had_nothing_to_do_is_started_again() -> None:
    reader = TextReader()
    assert reader.text(".html", b"<p>one") == "one"
    process = reader._process
    assert process is not None
    process.end.detach()
    process._connection.close()  # as after a minute: the process returns from its loop
    process._process.wait()
    assert reader.text(".html", b"<p>two") == "two"


@pytest.mark.parametrize(
    ("suffix", "reader", "installed", "library"),
    [
        (".pdf", "auto", {"pypdf", "docling"}, "pypdf"),
        (".pdf", "auto", {"docling"}, "docling"),
        (".pdf", "auto", set(), "pypdf"),
        (".pdf", "pypdf", {"docling"}, "pypdf"),
        (".pdf", "docling", {"pypdf"}, "docling"),
        (".html", "auto", {"docling"}, "selectolax"),
        (".html", "docling", {"docling"}, "docling"),
        (".docx", "auto", set(), "docling"),
        (".txt", "docling", set(), None),
        (".py", "auto", set(), None),
    ],
)
def test_what_reads_a_file(
    suffix: str, reader: Any, installed: set[str], library: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "find_spec", lambda name: SimpleNamespace() if name in installed else None)
    way = way_of(suffix, reader)
    assert (None if way is None else way.library) == library
    if library is not None and library not in installed:
        with pytest.raises(MissingProgramError, match=rf"need {library}: pip install 'distkv-dask\["):
            check_support([suffix], reader)


def test_a_reader_that_cannot_or_does_not_exist_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="pypdf cannot read EPUB files"):
        check_support([".epub", ".pdf"], "pypdf")
    with pytest.raises(InvalidRequestError, match="must be one of auto, pypdf, docling"):
        readers.checked_reader("word")
