"""Texts of users and documents are in no log, event, metric, status, page or trace, whatever happens to requests."""

from __future__ import annotations

import contextlib
import json
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
from distributed import Client, Scheduler, Worker
from tornado.httpclient import AsyncHTTPClient

from distkv_dask import DistKVError, Engine, InvalidRequestError, SamplingParams
from distkv_dask.client.text_stream import TextStream
from distkv_dask.errors import CapacityError, ChannelError, portable, without_quotes
from distkv_dask.messages.names import pack
from distkv_dask.messages.to_worker import Abort
from distkv_dask.worker import rmanager
from distkv_dask.worker.home import decode
from distkv_dask.worker.model.loaded import LoadedModel
from tests._cluster import engine_test
from tests._models import text_model_dir

CANARY = "xyloquartz"
HALF = f"{CANARY} \ud83d"
DASHBOARD = {"scheduler_kwargs": {"dashboard": True, "dashboard_address": "127.0.0.1:0"}}
TINY: dict[str, Any] = {"dtype": "float32", "kv_memory": "1 MiB", "block_tokens": 8, "prefill_chunk_tokens": 32,
                        "timeout_receive": 1}  # fmt: skip
"""Retries end after a second."""
TWO = SamplingParams(max_new_tokens=2, ignore_eos=True)


class Eavesdropper(logging.Handler):
    """Keeps every log record that would be shown by default, including tracebacks."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.setFormatter(logging.Formatter("%(name)s %(message)s"))
        self.heard: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.heard.append(self.format(record))


@contextlib.contextmanager
def eavesdropping(capfd: pytest.CaptureFixture[str]) -> Iterator[list[str]]:
    """Collect logs, warnings and output; at the end they must contain neither the canary nor its tokens."""
    handler = Eavesdropper()
    loggers = [logging.getLogger(name) for name in ("", "distributed", "distkv", "transformers")]
    levels = [(one, one.level, one.propagate) for one in loggers]
    for one in loggers:
        one.setLevel(logging.INFO)
    handled = [one for one in loggers if one.name == "root" or not one.propagate]
    for one in handled:
        one.addHandler(handler)
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            yield handler.heard
    finally:
        for one in handled:
            one.removeHandler(handler)
        for one, level, propagate in levels:
            one.setLevel(level)
            one.propagate = propagate
    handler.heard += [str(one.message) for one in warned] + list(capfd.readouterr())


def assert_silent(engine: Engine, *seen: Any) -> None:
    ids = engine.tokenizer.encode_more(CANARY)
    for one in seen:
        text = one if isinstance(one, str) else json.dumps(one, default=repr)
        for tell in (CANARY, ", ".join(map(str, ids[2:6])), json.dumps(ids[2:6]), CANARY[3:]):
            at = text.find(tell)
            assert at < 0, text[max(0, at - 500) : at + 200]


async def get(scheduler: Scheduler, path: str) -> str:
    answer = await AsyncHTTPClient().fetch(f"http://127.0.0.1:{scheduler.http_server.port}{path}")
    return answer.body.decode()


async def everything(engine: Engine, scheduler: Scheduler) -> list[Any]:
    """Everything that a running engine shows."""
    shown = [
        await get(scheduler, path) for path in ("/distkv/status.json", "/metrics", "/distkv", "/info/main/logs.html")
    ]
    events = [list(topic.events) for topic in scheduler._broker._topics.values()]
    graph = await engine.graph(CANARY, TWO)
    return [*shown, await engine.status(), events, repr(engine), graph, list(graph.tasks)]


async def ask_in_every_way(engine: Engine) -> None:
    """Requests that succeed, are refused, and fail."""
    many = SamplingParams(max_new_tokens=400, ignore_eos=True)
    messages = [{"role": "user", "content": CANARY}, {"role": "assistant", "content": f"<end>{CANARY}"}]
    sampling = [TWO, SamplingParams(max_new_tokens=2, stop=CANARY), TWO, TWO, TWO, many]
    await engine.generate([CANARY, CANARY, HALF, messages, [{"role": CANARY, "content": ""}], CANARY * 9], sampling)
    await engine.generate([{CANARY: 1}, [CANARY], CANARY * 500])  # type: ignore[list-item]
    for wrong in ({"schema": f'{{"{CANARY}'}, {"schema": {"type": CANARY}}, {"stop": HALF}, {"temperature": CANARY}):
        with contextlib.suppress(DistKVError):
            await engine.submit(CANARY, SamplingParams(**wrong))
    schema = {"type": "object", "properties": {CANARY: {"enum": [CANARY], "format": CANARY}}, "required": [CANARY]}
    with contextlib.suppress(DistKVError):
        await engine.submit(CANARY, SamplingParams(max_new_tokens=60, schema=schema))
    with contextlib.suppress(CapacityError):
        await engine.submit(CANARY * 300, TWO)
    pieces = engine.stream(CANARY, many)
    async for _ in pieces:
        break
    pieces.close()
    async with await engine.ingest(f"{CANARY} and more of it", name="report") as document:
        await document.ask([CANARY, HALF, ""], TWO)
        async with document.chat() as chat:
            await chat.ask(CANARY, TWO)
            await chat.ask(CANARY, TWO)
        assert CANARY not in repr(document)
    with contextlib.suppress(DistKVError):
        await engine.ingest(HALF)


def raises(*given: Any, **named: Any) -> Any:
    raise RuntimeError("spoiled by the test")


SPOILED = {
    "nothing": lambda patch: None,
    "forwards": lambda patch: patch.setattr(LoadedModel, "forward", raises),
    "draws": lambda patch: patch.setattr(decode, "draw_batch", raises),
    "schemas": lambda patch: patch.setattr(LoadedModel, "follower", raises),
    "answers": lambda patch: patch.setattr(TextStream, "add", raises),
}


@pytest.mark.parametrize("spoiled", SPOILED)
def test_no_text_of_a_request_is_told_to_anybody(
    spoiled: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    trace = tmp_path / "trace.json"

    @engine_test(2, **DASHBOARD)
    async def run(client: Client, scheduler: Scheduler, *workers: Worker) -> None:
        with eavesdropping(capfd) as heard:
            async with Engine(client, str(text_model_dir()), trace=str(trace), **TINY) as engine:
                SPOILED[spoiled](monkeypatch)
                with contextlib.suppress(DistKVError):
                    await ask_in_every_way(engine)
                seen = await everything(engine, scheduler)
                logs = await client.get_scheduler_logs(), await client.get_worker_logs()
        assert_silent(engine, *seen, *heard, logs, trace.read_text())
        assert CANARY in engine.tokenizer.decode(engine.tokenizer.encode(CANARY))
        assert any("distkv" in one for one in seen if isinstance(one, str))

    run()


def test_a_message_that_cannot_be_taken_is_logged_without_it(caplog: pytest.LogCaptureFixture) -> None:
    manager, engine = rmanager.RManager(), MagicMock()
    engine.abort.side_effect = raises
    manager.engines = {"engine": engine}
    manager.receive("engine", pack(Abort("tcp://a", 1, CANARY)))
    assert "a message of the gManager failed" in caplog.text
    assert CANARY not in caplog.text


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (portable(ValueError(CANARY), "worker tcp://a:1"), "ValueError on worker tcp://a:1"),
        (InvalidRequestError(CANARY), "InvalidRequestError"),
        (KeyError(CANARY), "KeyError"),
        (ChannelError("tcp://a:1 closed the channel"), "tcp://a:1 closed the channel"),
    ],
)
def test_others_words_are_left_out_of_what_is_logged(error: Exception, words: str) -> None:
    assert without_quotes(error) == words
