"""Every message of the gManager reaches its engine, value by value; none can end the worker."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import fields
from typing import Any

import pytest
from _managed import ADDRESS, AtOnce, Call, Managed, Recorded, Threaded
from distributed.comm.core import CommClosedError

from distkv_dask.errors import CapacityError, EngineClosedError
from distkv_dask.gang import DecodeWindow, Gang, PrefillChunk, SequenceState
from distkv_dask.messages import to_worker as do
from distkv_dask.messages.from_worker import Expected, Relocated
from distkv_dask.messages.names import (
    FROM_WORKER,
    TAKE_TRACE,
    TIME_LINK,
    TO_WORKER,
    Saved,
    SavedFile,
    SpilledFile,
    ToPeer,
    Transfer,
    pack,
    unpack,
)
from distkv_dask.placement import Endpoint, Span
from distkv_dask.sampling import SamplingParams
from distkv_dask.version import VERSION

HOLDERS = (Endpoint("w1", "host", 7), Endpoint("w2", "host", 8))
PLACEMENT = (Span("w1", 0, 16), Span(ADDRESS, 16, 32))
STATE = SequenceState(5, PLACEMENT, 20, 77, 9, SamplingParams())
SAVED = Saved("/folder", (SavedFile("blocks-t-0-16.arrow", 0, 16, 99, 1),), "t")
MOVE, SAVE = Transfer("move", 1), Transfer("save", 9)
SPILLED = (SpilledFile("blocks-a", 0, 16, 1, 2, ADDRESS), SpilledFile("blocks-b", 16, 32, 3, 4, ADDRESS))
RANGES = ((0, 16), (32, 48))

AT_ONCE: list[tuple[do.ToWorker, str, tuple[Any, ...]]] = [
    (do.Reserve(ADDRESS, 5, 16, 48), "reserve", (5, 16, 48)),
    (do.Share(ADDRESS, 4, 5, 0, 16), "runtime.pool.share", (4, 5, 0, 16)),
    (do.Begin(ADDRESS, 5, 4, 16), "runtime.home_state.adopt", (5, 4, 16)),
    (do.Keep(ADDRESS, 5, (16, 32), ended=True), "runtime.home_state.keep", (5, (16, 32), True)),
    (do.Keep(ADDRESS, 5, (), ended=False), "runtime.home_state.keep", (5, (), False)),
    (do.Retire(ADDRESS, 5), "retire", (5,)),
    (do.Release(ADDRESS, 5), "release_sequence", (5,)),
    (do.Free(ADDRESS, 5, 16, 48), "free", (5, 16, 48)),
    (do.Join(ADDRESS, STATE, HOLDERS), "join", (STATE, HOLDERS)),
    (do.Reset(ADDRESS, 3), "reset", (3,)),
    (do.Expect(ADDRESS, MOVE, 5, 16, 48), "expect", (MOVE, 5, 16, 48)),
    (do.Relocate(ADDRESS, 9, 5, PLACEMENT, HOLDERS), "relocate", (9, 5, PLACEMENT, HOLDERS)),
    (do.Demote(ADDRESS, SPILLED), "files.demote", (SPILLED,)),
    (do.Discard(ADDRESS, ("a", "b")), "files.discard", (("a", "b"),)),
    (do.Abort(ADDRESS, 6, "a holder died"), "abort", (6, "a holder died", False)),
    (do.Abort(ADDRESS, 6, "not needed", unused=True), "abort", (6, "not needed", True)),
]
"""Messages, and the calls of the engine that they become."""

IN_BACKGROUND: list[tuple[do.ToWorker, str, tuple[Any, ...]]] = [
    (do.Store(ADDRESS, SAVE, 5, RANGES, SAVED, 20), "store", (SAVE, 5, RANGES, SAVED, 20)),
    (do.Fetch(ADDRESS, 5, RANGES, SAVED, 20), "fetch", (5, RANGES, SAVED, 20)),
    (do.Send(ADDRESS, MOVE, 5, 16, 48, "w1", 0.5), "send", (MOVE, 5, range(16, 48), 0.5)),
]
"""Messages that take time, which are tasks on the loop."""


def opened() -> tuple[Managed, list[Call]]:
    """A worker with an engine that is open."""
    made, calls = Managed(AtOnce()), list[Call]()
    made.manager.engines["engine"] = Recorded(calls)  # type: ignore[assignment]
    return made, calls


def test_every_message_is_in_these_tables() -> None:
    known = {type(one) for one, *_ in (*AT_ONCE, *IN_BACKGROUND)} | {do.Open, do.Close}
    kinds = {one for one in vars(do).values() if isinstance(one, type) and issubclass(one, do.ToWorker)}
    assert known == kinds - {do.ToWorker}


@pytest.mark.parametrize(("message", "name", "given"), AT_ONCE, ids=lambda one: type(one).__name__)
def test_a_message_is_one_call_of_its_engine(message: do.ToWorker, name: str, given: tuple[Any, ...]) -> None:
    made, calls = opened()
    made.manager.receive("engine", pack(message))
    assert calls == [(name, given)]
    made.manager.receive("engine", message)  # Dask unwraps it on arrival, except within a process
    assert calls == [(name, given)] * 2


@pytest.mark.parametrize(("message", "name", "given"), IN_BACKGROUND, ids=lambda one: type(one).__name__)
def test_what_takes_time_runs_beside_the_messages_after_it(
    message: do.ToWorker, name: str, given: tuple[Any, ...]
) -> None:
    calls: list[Call] = []

    class Slow:
        """An engine and its files, whose work waits."""

        def __init__(self) -> None:
            self.files = self
            self.go_on = asyncio.Event()

        async def store(self, *given: Any) -> None:
            await self.go_on.wait()
            calls.append(("store", given))

        async def fetch(self, peer: Any, *given: Any) -> None:
            await self.go_on.wait()
            calls.append(("fetch", given))

        async def send(self, peer: Any, *given: Any) -> None:
            await self.go_on.wait()
            calls.append(("send", given))

        def reserve(self, *given: Any) -> None:
            calls.append(("reserve", given))

    async def run() -> None:
        made, engine = Managed(Threaded()), Slow()
        made.manager.engines["engine"] = engine  # type: ignore[assignment]
        made.manager.receive("engine", pack(message))
        await asyncio.sleep(0)
        made.manager.receive("engine", pack(do.Reserve(ADDRESS, 5, 0, 8)))
        assert calls == [("reserve", (5, 0, 8))]
        engine.go_on.set()
        for _ in range(3):
            await asyncio.sleep(0)
        assert calls[1:] == [(name, given)]
        assert not made.manager._tasks
        assert not made.manager._peers._sending

    asyncio.run(run())


@pytest.mark.parametrize("message", [one for one, *_ in (*AT_ONCE, *IN_BACKGROUND)], ids=lambda one: type(one).__name__)
def test_messages_for_an_engine_that_is_closed_are_nobodys(
    message: do.ToWorker, caplog: pytest.LogCaptureFixture
) -> None:
    made, calls = opened()
    before = len(made.sent)
    made.manager.receive("another", pack(message))
    assert (calls, len(made.sent)) == ([], before)
    assert not caplog.records


@pytest.mark.parametrize("error", [CapacityError("no room"), ValueError("odd"), KeyError(5)], ids=repr)
def test_a_message_that_fails_is_logged_and_the_next_is_done(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    made, calls = opened()

    class Failing(Recorded):
        def reserve(self, *_: Any) -> None:
            raise error

    made.manager.engines["engine"] = Failing(calls)  # type: ignore[assignment]
    with caplog.at_level(logging.ERROR):
        made.manager.receive("engine", pack(do.Reserve(ADDRESS, 5, 16, 48)))
        made.manager.receive("engine", pack(do.Release(ADDRESS, 5)))
    assert calls == [("release_sequence", (5,))]
    (record,) = caplog.records
    assert record.exc_info is not None
    assert record.exc_info[1] is error


def test_what_is_no_message_is_nobodys() -> None:
    made, calls = opened()
    for odd in (None, 5, "reserve", pack({"op": "reserve"}), Expected(ADDRESS, MOVE)):
        made.manager.receive("engine", odd)
    assert not calls


def test_no_text_of_users_is_logged_where_a_message_fails(caplog: pytest.LogCaptureFixture) -> None:
    made, _ = opened()

    class Failing:
        def join(self, *_: Any) -> None:
            raise ValueError("odd")

    made.manager.engines["engine"] = Failing()  # type: ignore[assignment]
    sampling = SamplingParams(stop=("a users words",))
    state = SequenceState(5, PLACEMENT, 20, 424242, 9, sampling, generated=(424243,))
    made.manager.receive("engine", pack(do.Join(ADDRESS, state, HOLDERS)))
    assert caplog.records
    assert not any(words in caplog.text for words in ("a users words", "424242", "424243"))


# Messages of the worker


def test_a_worker_announces_itself_and_its_version_in_plain_values() -> None:
    made = Managed(AtOnce())
    assert made.sent == [{"op": FROM_WORKER, "version": VERSION, "engine": ""}]


def test_a_message_travels_with_its_engine_and_the_workers_version() -> None:
    made = Managed(AtOnce())
    made.manager.tell("engine", Relocated(ADDRESS, 4))
    sent = made.sent[-1]
    assert unpack(sent.pop("message")) == Relocated(ADDRESS, 4)
    assert sent == {"op": FROM_WORKER, "version": VERSION, "engine": "engine"}


def test_nothing_is_raised_where_the_scheduler_is_gone() -> None:
    made = Managed(AtOnce())

    def gone(_: Any) -> None:
        raise CommClosedError("the scheduler is gone")

    made.worker.batched_stream.send = gone
    made.manager.tell("engine", Relocated(ADDRESS, 4))


def test_handlers_are_there_from_setup_on() -> None:
    made = Managed(AtOnce())
    assert made.worker.stream_handlers == {TO_WORKER: made.manager.receive}
    assert made.worker.handlers.keys() == {TAKE_TRACE, TIME_LINK, *ToPeer}


@pytest.mark.parametrize("traced", [False, True])
def test_a_trace_is_what_its_engine_recorded(traced: bool) -> None:
    made, calls = opened()

    class Engine:
        def __init__(self) -> None:
            self.runtime = self
            self.tracer = self if traced else None

        def take_spans(self) -> dict[str, int]:
            calls.append(("take_spans", ()))
            return {"home lane": 5}

    made.manager.engines["engine"] = Engine()  # type: ignore[assignment]
    assert unpack(made.manager.take_trace("engine")) == ({"home lane": 5} if traced else {})
    assert unpack(made.manager.take_trace("another")) == {}
    assert len(calls) == traced


# Tasks


def test_tasks_of_an_engine_that_is_closed_say_which_and_where() -> None:
    made, _ = opened()
    gang = Gang("gone", 1, "gang-1", 1, ADDRESS, ())
    calls = [
        lambda: made.manager.prefill(PrefillChunk(gang, 5, PLACEMENT, 0, (1,))),
        lambda: made.manager.decode(DecodeWindow(gang, 0, 1, 1.0)),
        lambda: made.manager.attend(gang),
        lambda: made.manager.layers("gone"),
    ]
    for call in calls:
        with pytest.raises(EngineClosedError, match=f"engine gone is not open on worker {ADDRESS}"):
            call()


def test_tasks_are_those_of_their_engine() -> None:
    made, calls = opened()
    gang = Gang("engine", 1, "gang-1", 1, ADDRESS, ())
    chunk, window = PrefillChunk(gang, 5, PLACEMENT, 0, (1,)), DecodeWindow(gang, 0, 1, 1.0)
    made.manager.prefill(chunk)
    made.manager.decode(window)
    made.manager.attend(gang)
    assert calls == [("chunks.prefill", (chunk,)), ("decode", (window,)), ("attend", (gang,))]


def test_values_of_the_tables_tell_fields_apart() -> None:
    """Two fields with one value could change places unseen."""
    for message, *_ in (*AT_ONCE, *IN_BACKGROUND):
        values = [repr(getattr(message, one.name)) for one in fields(message)]
        assert len({*values}) == len(values), message
