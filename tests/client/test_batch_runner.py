"""Requests in flight are bounded, lost workers cost retries but no rows, and a row that kills workers fails alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest

from distkv_dask.client.batch.rows import Content, Row
from distkv_dask.client.batch.runner import RETRIES, Outcome, Runner
from distkv_dask.client.batch.spec import BatchSpec
from distkv_dask.client.session.generation import Generation
from distkv_dask.completion import Completion
from distkv_dask.errors import CapacityError, EngineClosedError, InvalidRequestError, WorkerLostError
from distkv_dask.messages.client_calls import EngineFacts
from distkv_dask.sampling import SamplingParams

KEPT = pa.RecordBatch.from_pydict({"id": [0]})


class FakeEngine:
    """Answers requests in flight when no more are submitted, last in first out; ``fate`` says how a prompt ends."""

    facts = EngineFacts(100, 100, 1, "float32", "f00d", 1)
    tokenizer = SimpleNamespace(has_chat_template=False, encode=lambda text: [ord(letter) for letter in text])

    def __init__(self, fate: Callable[[str, list[str]], Exception | None]) -> None:
        self.fate = fate
        self.flying: list[tuple[str, Generation]] = []
        self.most = 0
        self.cancelled: list[str] = []
        self.asked: list[str] = []

    def ask_ids(self, ids: list[int], sampling: SamplingParams, **document: Any) -> Generation:
        return self.submit(ids, sampling)

    def submit(self, prompt: list[int], sampling: SamplingParams) -> Generation:
        text = "".join(map(chr, prompt))
        if len(prompt) > 90:
            raise InvalidRequestError("too long")
        generation = Generation(lambda: self.cancelled.append(text))
        self.flying.append((text, generation))
        self.asked.append(text)
        self.most = max(self.most, len(self.flying))
        return generation

    def land(self) -> None:
        """End all requests in flight."""
        together = [text for text, _ in self.flying]
        flying, self.flying = self.flying[::-1], []
        for text, generation in flying:
            if (error := self.fate(text, together)) is not None:
                generation.set_exception(error)
            else:
                generation.set_result(Completion(f"re {text}", (1, 2), len(text), "length"))


class Queue:
    """Stands for the runner's queue: when it is empty, the engine ends the requests in flight."""

    def __init__(self, engine: FakeEngine) -> None:
        self.engine, self.items = engine, []  # type: ignore[var-annotated]

    def put(self, item: Any) -> None:
        self.items.append(item)

    def get(self, timeout: float) -> Any:
        if not self.items:
            self.engine.land()
        return self.get_nowait()

    def get_nowait(self) -> Any:
        import queue

        if not self.items:
            raise queue.Empty
        return self.items.pop(0)


def row(label: int, text: str | Exception) -> Row:
    def read() -> Content:
        if isinstance(text, Exception):
            raise text
        return Content({"text": text})

    return Row(label, "f", KEPT, read)


def run(engine: FakeEngine, texts: list[Any], in_flight: int = 3) -> list[Outcome]:
    runner = Runner(engine, BatchSpec(), in_flight)  # type: ignore[arg-type]
    runner._ended = Queue(engine)  # type: ignore[assignment]
    return [one for some in runner.run((row(at, text), None) for at, text in enumerate(texts)) for one in some]


def test_no_more_requests_are_in_flight_than_allowed_and_every_row_ends_once() -> None:
    engine = FakeEngine(lambda *_: None)
    texts = [f"t{number}" for number in range(20)]
    found = run(engine, texts)
    assert engine.most == 3
    assert {one.row.label: one.answer.text for one in found if one.answer} == {n: f"re t{n}" for n in range(20)}
    assert len(found) == 20


def test_a_row_that_cannot_be_read_or_served_is_an_error_and_the_others_go_on() -> None:
    engine = FakeEngine(lambda text, _: CapacityError("no room") if text == "big" else None)
    found = run(engine, ["a", InvalidRequestError("undecodable"), "x" * 99, "big", " ", "b"])
    assert {one.row.label: one.error for one in found} == {
        0: None, 1: "undecodable", 2: "too long", 3: "no room", 4: "the text is empty", 5: None,
    }  # fmt: skip


def test_a_thousand_bad_rows_are_handed_on_as_they_come() -> None:
    def texts() -> Iterator[tuple[Row, None]]:
        for number in range(1000):
            yield row(number, InvalidRequestError("no")), None

    runner = Runner(FakeEngine(lambda *_: None), BatchSpec(), 3)  # type: ignore[arg-type]
    assert max(len(some) for some in runner.run(texts())) <= 256


def test_a_request_lost_with_its_worker_is_tried_again() -> None:
    lost: list[str] = []

    def fate(text: str, together: list[str]) -> Exception | None:
        lost.append(text)
        return WorkerLostError("gone") if lost.count(text) <= RETRIES else None

    assert all(one.error is None for one in run(FakeEngine(fate), ["a", "b", "c", "d"]))


def test_a_row_that_kills_every_worker_ends_as_an_error_and_costs_no_other_row() -> None:
    def fate(text: str, together: list[str]) -> Exception | None:
        return WorkerLostError("gone") if "poison" in together else None

    engine = FakeEngine(fate)
    found = run(engine, ["a", "poison", "b", "c", "d", "e"])
    assert {one.row.label for one in found if one.error} == {1}
    assert engine.asked.count("poison") == RETRIES + 2


def test_a_closed_engine_ends_the_batch_and_leaving_it_cancels_what_is_in_flight() -> None:
    with pytest.raises(EngineClosedError):
        run(FakeEngine(lambda text, _: EngineClosedError("gone") if text == "c" else None), ["a", "b", "c", "d"])
    engine = FakeEngine(lambda *_: None)
    runner = Runner(engine, BatchSpec(), 2)  # type: ignore[arg-type]
    runner._ended = Queue(engine)  # type: ignore[assignment]
    some = runner.run((row(at, f"t{at}"), None) for at in range(9))
    assert len(next(some)) == 2
    runner._ended.items = []  # type: ignore[attr-defined]
    engine.land = lambda: None  # type: ignore[method-assign]
    next(some)
    some.close()
    assert engine.cancelled == ["t2", "t3"]
