"""Uploads belong to one key; and the server does not wait for clients that send their requests slowly."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Iterator

import httpx
import openai
import pytest
from _served import KEY, Served, open_session, served, until

from distkv_dask.client.serve import body, protocol

OTHER = "another-key-of-somebody-else"
CHAT = "/v1/chat/completions"
USER = {"messages": [{"role": "user", "content": "Who?"}], "max_tokens": 4}
LINE = json.dumps({"custom_id": "r", "method": "POST", "url": CHAT, "body": {"model": "any", **USER}}).encode()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("data")
    with open_session(1) as session, served(session, folder, keys=frozenset({KEY, OTHER})) as found:
        yield found


def test_files_and_batches_are_seen_by_the_key_that_made_them_alone(server: Served) -> None:
    mine, theirs = server.openai(), server.openai(OTHER)
    file = mine.files.create(file=("in.jsonl", LINE), purpose="batch")
    batch = mine.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h")
    until(lambda: mine.batches.retrieve(batch.id).status == "completed")
    output = mine.batches.retrieve(batch.id).output_file_id
    assert {one.id for one in mine.files.list()} == {file.id, output}
    assert not theirs.files.list().data + theirs.batches.list().data
    for ask in (
        lambda: theirs.files.retrieve(file.id),
        lambda: theirs.files.content(file.id),
        lambda: theirs.files.content(output),
        lambda: theirs.files.delete(file.id),
        lambda: theirs.files.list(after=file.id),
        lambda: theirs.batches.retrieve(batch.id),
        lambda: theirs.batches.cancel(batch.id),
        lambda: theirs.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h"),
    ):
        with pytest.raises(openai.NotFoundError):
            ask()
    assert json.loads(mine.files.content(output).text)["custom_id"] == "r"
    with server.http() as http:
        shown = http.get(f"/v1/files/{file.id}").json(), http.get(f"/v1/batches/{batch.id}").json()
    assert not any("owner" in one for one in shown)
    mine.files.delete(file.id)
    mine.files.delete(output)


def connected(server: Served) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=60)


@pytest.mark.parametrize("first", [b"", b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"], ids=["new", "used"])
def test_a_head_that_never_ends_does_not_keep_its_connection(
    server: Served, first: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "HEADER_SECONDS", 0.3)
    with connected(server) as connection:
        connection.sendall(first + b"GET /v1/models HTTP/1.1\r\nX-Slow: ")
        connection.settimeout(0.02)
        with contextlib.suppress(ConnectionError):
            while True:
                with contextlib.suppress(TimeoutError):
                    if not connection.recv(1 << 16):
                        break
                connection.sendall(b"x")
    done = server.openai().chat.completions.create(model="tiny", messages=USER["messages"], max_tokens=1000)
    assert done.choices, "an answer may take longer than a head"


def test_a_body_that_never_ends_is_an_error(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body, "BODY_SECONDS", 0.3)
    with connected(server) as connection:
        head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\nContent-Length: 90\r\n"
        connection.sendall((head + 'Content-Type: application/json\r\n\r\n{"model"').encode())
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 408")


def test_a_body_that_nobody_reads_does_not_keep_its_connection(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "HEADER_SECONDS", 0.3)
    with connected(server) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nContent-Length: 90\r\n\r\nx")
        received = b""
        while more := connection.recv(1 << 16):
            received += more
    assert received.startswith(b"HTTP/1.1 200")
    assert httpx.get(f"{server.url}/health").status_code == 200
