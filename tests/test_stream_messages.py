"""Messages between gManager and rManagers: sent as they are, known at both ends, and without users' texts in reprs."""

from __future__ import annotations

import dataclasses
import pickle
from array import array
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock, call

import pytest

from distkv_dask.errors import WorkerLostError
from distkv_dask.gang import Exchanged, Pooled, SequenceState, WindowResult
from distkv_dask.geometry import Geometry
from distkv_dask.messages import from_worker as did
from distkv_dask.messages import to_worker as do
from distkv_dask.messages.names import Saved, SavedFile, SpilledFile, Transfer, pack
from distkv_dask.placement import Endpoint, Span
from distkv_dask.sampling import SamplingParams
from distkv_dask.scheduler.dispatch import Dispatcher
from distkv_dask.worker.rmanager import RManager

SECRET = 987654321  # a token of a user
HOLDERS = (Endpoint("tcp://b", "host", 1),)
PLACEMENT = (Span("tcp://a", 0, 8),)
SAVED = Saved("folder", (SavedFile("name", 0, 8, 100, 7),))
MOVE, SAVE = Transfer("move", 1), Transfer("save", 9)
SPILLED = (SpilledFile("name", 0, 8, 100, 0, "tcp://a"),)
STATE = SequenceState(7, PLACEMENT, 8, SECRET, 5, SamplingParams(stop=("secret",)), array("i", [SECRET]), (SECRET,))
GEOMETRY = Geometry(2, 4, 2, 8, 100, 1000, "float32")
WORKER = "tcp://a"

TO_WORKER: dict[do.ToWorker, Any] = {
    do.Reserve(WORKER, 7, 0, 8): call.reserve(7, 0, 8),
    do.Share(WORKER, 7, 9, 0, 8): call.runtime.pool.share(7, 9, 0, 8),
    do.Begin(WORKER, 7, 5, 8): call.runtime.home_state.adopt(7, 5, 8),
    do.Keep(WORKER, 7, (8,), True): call.runtime.home_state.keep(7, (8,), True),
    do.Retire(WORKER, 7): call.retire(7),
    do.Release(WORKER, 7): call.release_sequence(7),
    do.Free(WORKER, 7, 0, 8): call.free(7, 0, 8),
    do.Join(WORKER, STATE, HOLDERS): call.join(STATE, HOLDERS),
    do.Reset(WORKER, 3): call.reset(3),
    do.Expect(WORKER, MOVE, 7, 0, 8): call.expect(MOVE, 7, 0, 8),
    do.Relocate(WORKER, 1, 7, PLACEMENT, HOLDERS): call.relocate(1, 7, PLACEMENT, HOLDERS),
    do.Demote(WORKER, SPILLED): call.files.demote(SPILLED),
    do.Discard(WORKER, ("name",)): call.files.discard(("name",)),
    do.Abort(WORKER, 5, "why", True): call.abort(5, "why", True),
    do.Store(WORKER, SAVE, 7, ((0, 8),), SAVED): call.files.store(SAVE, 7, ((0, 8),), SAVED, 0),
    do.Fetch(WORKER, 7, ((0, 8),), SAVED): None,
    do.Send(WORKER, MOVE, 7, 0, 8, "tcp://b", 0.5): None,
    do.Close(WORKER): None,
}  # fmt: skip

FROM_WORKER: list[did.FromWorker] = [
    did.Opened(
        *(WORKER, HOLDERS[0], "instance", "tcp", "cpu", 10, 100, 0, 0, 64),
        *(GEOMETRY, "f", None, "torch: for a test", "mapped"),
    ),
    did.OpenFailed(WORKER, WorkerLostError("why")),
    did.Closed(WORKER),
    did.Lost(WORKER, "why"),
    did.AdaptersKept(WORKER, ("/adapters/one",), 100),
    did.ChunkStarted(WORKER, 5),
    did.ChunkDone(WORKER, 7, 5, Exchanged(), pooled=Pooled(0, 8, str(SECRET).encode())),
    did.Prefilled(WORKER, 7, 5, SECRET, None, Exchanged()),
    did.WindowStarted(WORKER, 3),
    did.WindowDone(WORKER, 3, 0, WindowResult({7: [SECRET]}, {}, 1, 0.1), ()),
    did.GangFailed(WORKER, 5, WorkerLostError("why")),
    did.Retired(WORKER, 7),
    did.Expected(WORKER, MOVE),
    did.Sent(WORKER, MOVE),
    did.Relocated(WORKER, 1),
    did.Stored(WORKER, SAVE, SAVED.files),
    did.Fetched(WORKER, 7),
]


def named(messages: Any) -> list[str]:
    return sorted(type(one).__name__ for one in messages)


def kinds(module: Any, base: type) -> list[str]:
    found = (one for one in vars(module).values() if isinstance(one, type) and issubclass(one, base))
    return sorted(one.__name__ for one in found if one is not base)


def test_all_messages_are_tried_here() -> None:
    assert named([*TO_WORKER, do.Open(WORKER, None)]) == kinds(do, do.ToWorker)  # type: ignore[arg-type]
    assert named(FROM_WORKER) == kinds(did, did.FromWorker)


@pytest.mark.parametrize("message", [*TO_WORKER, *FROM_WORKER], ids=lambda one: type(one).__name__)
def test_a_message_arrives_as_it_was_sent_and_cannot_be_changed(message: Any) -> None:
    arrived = pickle.loads(pickle.dumps(message))
    assert type(arrived) is type(message)
    for field in dataclasses.fields(message):
        sent, got = getattr(message, field.name), getattr(arrived, field.name)
        assert repr(got) == repr(sent) if isinstance(sent, Exception) else got == sent
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(message, field.name, None)
    assert str(SECRET) not in repr(message)
    assert "secret" not in repr(message)


@pytest.mark.parametrize("message", [one for one in TO_WORKER if TO_WORKER[one]], ids=lambda one: type(one).__name__)
def test_a_worker_does_what_a_message_says_for_the_engine_that_it_names(message: do.ToWorker) -> None:
    manager, engine, other = RManager(), MagicMock(), MagicMock()
    manager.engines = {"engine": engine, "other": other}
    manager._spawn = MagicMock()  # type: ignore[method-assign]
    manager.receive("engine", pack(message))
    assert engine.mock_calls == [TO_WORKER[message]]
    assert not other.mock_calls
    manager.receive("closed", pack(message))
    assert len(engine.mock_calls) == 1


def test_a_message_that_cannot_be_taken_does_not_end_the_worker(caplog: pytest.LogCaptureFixture) -> None:
    manager, engine = RManager(), MagicMock()
    engine.reserve.side_effect = ValueError("a fault")
    manager.engines = {"engine": engine}
    manager.receive("engine", pack(do.Reserve(WORKER, 7, 0, 8)))
    assert "a message of the gManager failed" in caplog.text


def test_a_message_that_a_worker_does_not_know_is_in_its_log_without_its_contents(
    caplog: pytest.LogCaptureFixture,
) -> None:
    manager, engine = RManager(), MagicMock()
    manager.engines = {"engine": engine}
    manager.receive("engine", pack("secret"))
    assert not engine.mock_calls
    assert "no handler for str" in caplog.text
    assert "secret" not in caplog.text


@pytest.mark.parametrize("message", FROM_WORKER, ids=lambda one: type(one).__name__)
def test_the_gmanager_takes_every_message_of_a_worker(message: did.FromWorker) -> None:
    from _simulated import cluster_of

    cluster = cluster_of(0, 10)
    cluster.submit(7, array("i", range(8)), SamplingParams(max_new_tokens=4))
    handled: list[Any] = []
    state = MagicMock(is_closing=False, group=None, machine=cluster.machine, life=cluster.life)
    state.waits_for.return_value = False
    dispatcher = SimpleNamespace(
        handle=lambda _, event: handled.append(cluster.machine.handle(event, 1.0)),
        _opened=lambda state, message: Dispatcher._opened(dispatcher, state, message),  # type: ignore[arg-type]
        _lose=lambda *_: handled.append("lost"),
        _engine_lost=lambda *_: handled.append("lost"),
        _open_failed=lambda *_: handled.append("failed"),
        _gang_failed=lambda *_: handled.append("failed"),
        submitter=MagicMock(),
        survey=MagicMock(),
    )
    Dispatcher.take_message(dispatcher, state, message)  # type: ignore[arg-type]
    assert handled or state.adapters_kept.called
