"""Files and batches over HTTP, by OpenAI's own client; a restarted server continues where the last one stopped."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import openai
import pytest
from _served import Served, open_session, served, until

from distkv_dask.client.serve import batch_queue, store
from distkv_dask.client.serve.store import private
from distkv_dask.client.session.session import Session
from distkv_dask.sampling import SamplingParams

CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def session() -> Iterator[Session]:
    with open_session() as found:
        yield found


@pytest.fixture(scope="module")
def server(session: Session, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(session, tmp_path_factory.mktemp("data") / "kept") as found:
        yield found


def lines(*bodies: dict[str, Any], url: str = CHAT) -> bytes:
    """A file of requests."""
    made = [
        {"custom_id": f"r{at}", "method": "POST", "url": url, "body": {"model": "any"} | body}
        for at, body in enumerate(bodies)
    ]
    return "\n".join(map(json.dumps, made)).encode()


def says(text: str, **body: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], "max_tokens": 4, **body}


def begun(client: openai.OpenAI, content: bytes, **how: Any) -> openai.types.Batch:
    file = client.files.create(file=("in.jsonl", content), purpose="batch")
    return client.batches.create(**({"input_file_id": file.id, "endpoint": CHAT, "completion_window": "24h"} | how))


def ended(client: openai.OpenAI, name: str) -> openai.types.Batch:
    until(lambda: client.batches.retrieve(name).status in ("completed", "failed", "cancelled"))
    return client.batches.retrieve(name)


def test_a_batch_is_answered_as_single_requests_are_and_its_errors_are_a_file_of_their_own(server: Served) -> None:
    client, texts = server.openai(), ["Who?", "Where?", "When?"]
    content = lines(*map(says, texts), says("How?", logit_bias={"5": 1}), says("odd", temperature=-1))
    content += b"\n" + lines({"prompt": "x"}, url="/v1/completions").replace(b"r0", b"r5") + b"\nnonsense"
    batch = begun(client, content, metadata={"of": "tests"})
    done = ended(client, batch.id)
    assert (done.status, done.metadata) == ("completed", {"of": "tests"})
    assert done.request_counts.model_dump() == {"total": 7, "completed": 3, "failed": 4}
    answers = [json.loads(line) for line in client.files.content(done.output_file_id).text.splitlines()]
    assert [one["custom_id"] for one in answers] == ["r0", "r1", "r2"]
    for text, answer in zip(texts, answers, strict=True):
        single = client.chat.completions.create(model="tiny", **says(text))
        assert answer["response"]["body"]["choices"][0]["message"]["content"] == single.choices[0].message.content
    errors = [json.loads(line) for line in client.files.content(done.error_file_id).text.splitlines()]
    assert [one["custom_id"] for one in errors] == ["r3", "r4", "r5", None]
    for error, named in zip(errors, ("logit_bias", "temperature", "this batch is for", "JSON"), strict=True):
        assert named in error["error"]["message"]


def test_files_are_listed_read_and_deleted(server: Served) -> None:
    client, content = server.openai(), lines(says("Who?"))
    file = client.files.create(file=("mine.jsonl", content), purpose="batch")
    assert (file.filename, file.bytes, file.purpose) == ("mine.jsonl", len(content), "batch")
    assert client.files.retrieve(file.id) == file
    assert file.id in [one.id for one in client.files.list(purpose="batch")]
    assert client.files.content(file.id).read() == content
    assert client.files.delete(file.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(file.id)


def test_lists_come_a_page_at_a_time(server: Served) -> None:
    client = server.openai()
    made = {client.files.create(file=("a", b"{}"), purpose="batch").id for _ in range(5)}
    assert made <= {one.id for one in client.files.list(limit=2)}
    first = client.files.list(limit=2)
    assert (len(first.data), first.has_more) == (2, True)


@pytest.mark.parametrize("name", ["file-" + "0" * 24, "../../etc/passwd", "file-..%2f..%2fx", "batch-" + "0" * 24])
def test_ids_of_nothing_are_not_found_and_lead_nowhere(server: Served, name: str) -> None:
    with server.http() as http:
        for path in (f"/v1/files/{name}", f"/v1/files/{name}/content", f"/v1/batches/{name}"):
            assert http.get(path).status_code == 404
        assert http.delete(f"/v1/files/{name}").status_code == 404
        assert http.post(f"/v1/batches/{name}/cancel").status_code == 404


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"endpoint": "/v1/responses"}, "endpoint"),
        ({"completion_window": "1h"}, "completion_window"),
        ({"input_file_id": "file-x"}, "file-x"),
        ({"metadata": {"a": 1}}, "metadata"),
        ({"extra_body": {"output_expires_after": {}}}, "output_expires_after"),
    ],
)
def test_a_batch_that_cannot_be_is_refused_by_name(server: Served, change: dict[str, Any], named: str) -> None:
    with pytest.raises((openai.BadRequestError, openai.NotFoundError), match=named):
        begun(server.openai(), lines(says("Who?")), **change)


def test_uploads_that_are_none_are_refused(server: Served) -> None:
    client = server.openai()
    with pytest.raises(openai.BadRequestError, match="purpose"):
        client.files.create(file=b"{}", purpose="assistants")
    with server.http() as http:
        assert http.post("/v1/files", data={"purpose": "batch"}).status_code == 400
        assert http.post("/v1/files", json={}).status_code == 400
        torn = {"Content-Type": "multipart/form-data; boundary=x"}
        assert http.post("/v1/files", content=b"--x\r\nnonsense", headers=torn).status_code == 400
        big = (b" " * (1 << 20) for _ in range(201))
        answer = http.post("/v1/files", content=big, headers=torn)
        assert answer.status_code in (400, 413)


def test_a_cancelled_batch_ends_with_what_it_has(server: Served) -> None:
    client = server.openai()
    slow = begun(client, lines(*[says(f"{at}", max_tokens=2000, ignore_eos=True) for at in range(60)]))
    waiting = begun(client, lines(says("never")))
    until(lambda: client.batches.retrieve(slow.id).status == "in_progress")
    with pytest.raises(openai.ConflictError, match="cancel it first"):
        client.files.delete(slow.input_file_id)
    assert client.batches.cancel(waiting.id).status == "cancelled"
    assert client.batches.cancel(slow.id).status == "cancelling"
    done = ended(client, slow.id)
    assert (done.status, done.request_counts.total) == ("cancelled", 60)
    with pytest.raises(openai.ConflictError, match="has ended"):
        client.batches.cancel(slow.id)
    server.idle()
    assert ended(client, begun(client, lines(says("next"))).id).request_counts.completed == 1


def test_answers_are_for_their_owner_alone_while_they_are_written(
    server: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes, write = list[int](), batch_queue.write_openai_answers

    def looked_at(rows: Any, model: str, file: Any) -> None:
        modes.append(stat.S_IMODE(os.fstat(file.fileno()).st_mode))
        write(rows, model, file)

    monkeypatch.setattr(batch_queue, "write_openai_answers", looked_at)
    assert ended(server.openai(), begun(server.openai(), lines(says("Hello"))).id).status == "completed"
    assert modes == [0o600]


def test_a_server_that_is_started_again_goes_on_with_its_batches(session: Session, tmp_path: Path) -> None:
    texts, how = [f"Number {at}?" for at in range(12)], {"max_tokens": 400, "ignore_eos": True}
    folder = tmp_path / "kept"
    with served(session, folder) as first:
        batch = begun(first.openai(), lines(*[says(text, **how) for text in texts]))
        until(lambda: first.openai().batches.retrieve(batch.id).status == "in_progress")
    assert json.loads((folder / f"{batch.id}.json").read_text())["status"] == "in_progress"
    with served(session, folder) as second:
        done = ended(second.openai(), batch.id)
        found = [json.loads(line) for line in second.openai().files.content(done.output_file_id).text.splitlines()]
    assert [one["custom_id"] for one in found] == [f"r{at}" for at in range(12)]
    sampling = SamplingParams(max_new_tokens=400, ignore_eos=True)
    alone = session.submit([{"role": "user", "content": texts[3]}], sampling).result(60)
    assert found[3]["response"]["body"]["choices"][0]["message"]["content"] == alone.text
    for path in folder.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_a_full_disk_delays_batches_and_leaves_nothing_unfinished(
    server: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    left = 0  # writes of batches' records that the disk has room for

    def full(path: Path) -> BinaryIO:
        nonlocal left
        if path.name.startswith("batch-"):
            left -= 1
            if left < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return private(path)

    client = server.openai()
    with monkeypatch.context() as patched:
        patched.setattr(store, "private", full)
        patched.setattr(batch_queue, "PAUSE", 0.05)
        with pytest.raises(openai.APIStatusError, match=r"No space left") as refused:
            begun(client, lines(says("Who?")))
        assert refused.value.status_code == 507
        left = 1
        batch = begun(client, lines(says("Who?")))
        until(lambda: left < -5)
        assert client.batches.retrieve(batch.id).status == "validating"
        left = 1000
        done = ended(client, batch.id)
    assert (done.status, done.request_counts.completed) == ("completed", 1)
    assert f"batch {batch.id} is tried again" in caplog.text
    assert "No space left" in caplog.text


def test_a_batch_of_embeddings_gives_those_of_single_requests(server: Served) -> None:
    client, texts = server.openai(), ["Who?", ["Where?", "When?"]]
    content = lines(*({"input": text} for text in texts), {"input": ""}, url="/v1/embeddings")
    batch = ended(client, begun(client, content, endpoint="/v1/embeddings").id)
    assert (batch.status, batch.request_counts.completed, batch.request_counts.failed) == ("completed", 2, 1)
    answers = [json.loads(line) for line in client.files.content(batch.output_file_id).text.splitlines()]
    for text, answer in zip(texts, answers, strict=True):
        alone = client.embeddings.create(model="tiny", input=text, encoding_format="float")
        for found, expected in zip(answer["response"]["body"]["data"], alone.data, strict=True):
            assert found["embedding"] == pytest.approx(expected.embedding, abs=1e-5)
