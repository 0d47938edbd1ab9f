"""Bad requests give errors in OpenAI's form with the right status, and the next request is answered."""

from __future__ import annotations

import json
import logging
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from _served import KEY, Served, open_session, served
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_openai_requests import JSON, REFUSED

from distkv_dask.client.serve.keys import VARIABLE, Keys, read_keys
from distkv_dask.errors import ConfigError

CHAT = "/v1/chat/completions"
BODY = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with open_session(1) as session, served(session, tmp_path_factory.mktemp("data")) as found:
        yield found


@pytest.fixture(autouse=True)
def _the_next_request_is_answered(server: Served) -> Iterator[None]:
    yield
    with server.http() as http:
        done = http.post(CHAT, json=BODY)
    assert done.status_code == 200, done.text
    assert done.json()["usage"]["completion_tokens"] <= 2


def refused(response: httpx.Response, status: int, named: str, code: str | None = None) -> None:
    """Check an error."""
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (status, code), response.text
    assert named in error["message"]
    assert error["type"] == {401: "authentication_error", 403: "permission_error"}.get(status, "invalid_request_error")


@pytest.mark.parametrize(
    "header", [None, "Bearer wrong", f"Basic {KEY}", KEY, "Bearer", f"Bearer {KEY}x", "Bearer \xe9"]
)
@pytest.mark.parametrize("path", [CHAT, "/v1/files", "/v1/models", "/metrics", "/nothing"])
def test_a_wrong_key_opens_nothing(server: Served, header: str | None, path: str) -> None:
    headers = {} if header is None else {"Authorization": header.encode("latin-1")}
    with server.http(None) as http:
        answer = http.post(path, json=BODY, headers=headers) if path == CHAT else http.get(path, headers=headers)
    refused(answer, 401, "API key", "invalid_api_key")
    assert answer.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("announced", [True, False], ids=["length", "chunks"])
def test_a_body_of_100_megabytes_is_refused_and_not_kept(server: Served, announced: bool) -> None:
    piece = b" " * (1 << 20)
    body = piece * 100 if announced else (piece for _ in range(100))
    with server.http() as http:
        answer = http.post(CHAT, content=body, headers={"Content-Type": "application/json"})
    refused(answer, 413, "1,048,576 bytes")


@pytest.mark.parametrize(
    ("body", "named"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"[1]", "send an object"),
        (b"null", "send an object"),
        (b"\xff\xfe{}", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"model": "tiny", "model": "other"}', "twice"),
        (json.dumps(BODY | {"temperature": float("nan")}).encode(), "temperature"),
        (json.dumps(BODY | {"seed": 10**400}).encode(), "seed"),
    ],
    ids=range(9),
)
def test_what_is_no_json_object_is_refused(server: Served, body: bytes, named: str) -> None:
    with server.http() as http:
        refused(http.post(CHAT, content=body, headers={"Content-Type": "application/json"}), 400, named)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model": None}, "model is None"),
        ({"model": 7}, "model is 7"),
        ({"messages": "Hi"}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": 7}]}, "chat message 0"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "image_url"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "surrogate"),
        ({"max_tokens": 0}, "max_new_tokens"),
        ({"max_tokens": "9"}, "max_new_tokens"),
        ({"max_tokens": 10**9}, "window"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 2}, "top_p"),
        ({"stop": [7]}, "stop"),
        ({"stream": "yes"}, "stream is 'yes'"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"all": 1}}, "stream_options"),
        ({"prompt": "x"}, "instead of a prompt"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "none"}}}}, "schema"),
        *(({name: REFUSED[name]}, name) for name in ("tools", "logit_bias", "frequency_penalty", "audio", "n_")),
    ],
    ids=str,
)
def test_what_is_not_done_is_refused_by_name_before_a_stream_begins(
    server: Served, change: dict[str, Any], named: str
) -> None:
    for stream in ({}, {"stream": True}) if not change.keys() & {"stream", "stream_options"} else ({},):
        body = json.dumps(BODY | stream | change)
        with server.http() as http:
            refused(http.post(CHAT, content=body, headers={"Content-Type": "application/json"}), 400, named)


@pytest.mark.parametrize("stream", [True, False])
def test_a_prompt_larger_than_the_cluster_is_refused_with_what_there_is(server: Served, stream: bool) -> None:
    with server.http() as http:
        answer = http.post("/v1/completions", json={"model": "tiny", "prompt": [5] * 4000, "stream": stream})
    refused(answer, 400, "bytes of KV memory", "context_length_exceeded")


def test_other_methods_paths_and_kinds_of_body_are_errors_of_the_same_form(server: Served) -> None:
    with server.http() as http:
        refused(http.get(CHAT), 405, "method")
        refused(http.get("/v1/moderations"), 404, "no such path")
        refused(http.get("/v1/embeddings"), 405, "method")
        refused(http.post("/v1/responses", json={}), 404, "no such path")
        refused(http.post(CHAT, content=json.dumps(BODY), headers={"Content-Type": "text/plain"}), 415, "text/plain")


@pytest.mark.parametrize("sent", [b"", b"GET", b"\x16\x03\x01\x02\x00", b"POST /v1/chat/completions HTTP/1.1\r\n\r\n"])
def test_what_is_no_http_ends_its_connection_alone(server: Served, sent: bytes) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        connection.sendall(sent)
        connection.shutdown(socket.SHUT_WR)
        while connection.recv(1 << 16):
            pass


def test_a_client_that_leaves_in_the_middle_of_its_body_leaves_nothing(server: Served) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\nContent-Length: 900\r\n"
        connection.sendall((head + 'Content-Type: application/json\r\n\r\n{"model"').encode())
    server.idle()


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    body=st.dictionaries(st.sampled_from([*REFUSED, *BODY, "temperature", "seed", "stop", "stream"]), JSON, max_size=4)
)
def test_any_body_has_an_answer_or_an_error(server: Served, body: dict[str, Any]) -> None:
    with server.http() as http:
        content = json.dumps(BODY | body).encode()
        answer = http.post(CHAT, content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code < 500, answer.text
    assert answer.status_code == 200 or answer.json()["error"]["message"]


def test_logs_hold_nothing_of_requests(server: Served, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with server.http() as http:
        secret = "the password is swordfish"
        http.post(CHAT, json=BODY | {"messages": [{"role": "user", "content": secret}]})
        http.post(CHAT, json=BODY | {secret: secret})
    assert "swordfish" not in caplog.text


def test_keys_come_from_a_file_and_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    path, one, two = tmp_path / "keys", "k" * 16, "l" * 20
    path.write_text(f"# ours\n{one}\n\n")
    monkeypatch.setenv(VARIABLE, f" {two},")
    keys = read_keys(path)
    owners = [keys.owner(f"Bearer {key}") for key in (one, two, "m" * 16)]
    assert len({None, "", *owners[:2]}) == 4
    assert owners[2] is None
    assert read_keys(path).owner(f"Bearer {one}") == owners[0], "also for a later server"
    monkeypatch.delenv(VARIABLE)
    assert not read_keys(None)
    assert Keys(frozenset()).owner(None) == ""
    for text, named in (("", "no API keys"), ("short", "5 characters"), ("with a space in it all", "without spaces")):
        path.write_text(text)
        with pytest.raises(ConfigError, match=named) as caught:
            read_keys(path)
        assert not text or text not in str(caught.value)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_keys(tmp_path / "none")
