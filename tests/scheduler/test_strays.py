"""Events that are late, duplicated, or about unknown subjects change nothing in any state."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args, get_type_hints

import pytest
from _happenings import ONE, asked_about, take
from _simulated import Simulated
from _situations import SITUATIONS

from distkv_dask.errors import GangAbortedError
from distkv_dask.gang import Exchanged, WindowResult
from distkv_dask.messages import from_worker as did
from distkv_dask.messages import to_worker as to
from distkv_dask.messages.names import SavedFile, Transfer
from distkv_dask.placement import Endpoint
from distkv_dask.scheduler.lifecycle.events import Drain, Event, Pause, Stop, WorkerLost, WorkerReady

NEVER = 10**6
"""An unused number."""
KINDS = get_args(get_type_hints(Transfer)["kind"])
"""What a transfer may be for."""
STRANGER = "nobody"
"""A worker that does not exist."""
FAILURE = OSError("the disk is full")
FILE = SavedFile("stray", 0, 4, 100, 7)


def everything(cluster: Simulated) -> dict[str, Any]:
    """The whole state of the state machine as text."""
    life = cluster.life
    known = {name: getattr(life, name) for name in life.__slots__ if name not in ("now", "commands", "numbers")}
    known |= {"workers": life.ledger.workers, "sequences": life.ledger.sequences, "epoch": life.ledger.epoch}
    known |= {"queue": list(life.queue), "documents": vars(life.index)}
    return {name: text for name, one in known.items() if " object at 0x" not in (text := repr(one))}


def assert_ignored(cluster: Simulated, event: Event) -> None:
    before = everything(cluster)
    commands = cluster.machine.handle(event, cluster.now)
    after = everything(cluster)
    assert {name: text for name, text in after.items() if before[name] != text} == {}, event
    if isinstance(event, did.Stored):  # files that nobody needs are deleted
        commands = [one for one in commands if not isinstance(one, to.Discard)]
    assert commands == [], event


def strays(cluster: Simulated) -> Iterator[Event]:
    """Events that are not expected."""
    life, result = cluster.life, WindowResult({ONE: [7]}, {ONE: "stop"}, 1, 0.1)
    for worker in (*life.ledger.workers, STRANGER):
        yield did.ChunkDone(worker, ONE, NEVER, Exchanged())
        yield did.ChunkDone(worker, NEVER, NEVER, Exchanged())
        yield did.Prefilled(worker, ONE, NEVER, 5, None, Exchanged())
        yield did.WindowStarted(worker, NEVER)
        yield did.WindowDone(worker, NEVER, 0, result, ())
        yield did.WindowDone(worker, 0, NEVER, result, ())
        yield did.GangFailed(worker, NEVER, GangAbortedError("why"))
        yield did.Retired(worker, NEVER)
        for kind in KINDS:
            yield did.Expected(worker, Transfer(kind, NEVER))
            yield did.Expected(worker, Transfer(kind, NEVER), "no room")
            yield did.Sent(worker, Transfer(kind, NEVER))
            yield did.Sent(worker, Transfer(kind, NEVER), "why")
        yield did.Relocated(worker, NEVER)
        for kind in KINDS:
            yield did.Stored(worker, Transfer(kind, NEVER))
        yield did.Fetched(worker, NEVER)
        asked = {(type(one), one.worker) for one in asked_about(cluster)}
        writes = [Transfer("save", ONE), *(Transfer("spill", number) for number in life.disks.numbers)]
        if (to.Retire, worker) not in asked and not life.requests[ONE].retires[worker]:
            yield did.Retired(worker, ONE)
        if (to.Store, worker) not in asked:
            for transfer in writes:
                yield did.Stored(worker, transfer, (FILE,))
                yield did.Stored(worker, transfer, (), FAILURE)
        if (to.Fetch, worker) not in asked:
            yield did.Fetched(worker, ONE)
            yield did.Fetched(worker, ONE, FAILURE)
    for number, move in life.moves.under_way.items():
        if move.phase != "expecting":
            yield did.Expected(move.move.target, Transfer("move", number))
            yield did.Expected(move.move.target, Transfer("move", number), "no room")
        if move.phase != "sending":
            yield did.Sent(move.move.source, Transfer("move", number))
            yield did.Sent(move.move.source, Transfer("move", number), "why")
        if move.phase != "switching":
            yield did.Relocated(move.move.source, number)
    yield WorkerLost(STRANGER)
    yield WorkerReady(Endpoint(next(iter(cluster.pools)), "127.0.0.1", 1), 99)
    yield Drain(STRANGER, True)
    yield Drain(STRANGER, False)
    yield Pause(frozenset([STRANGER]))
    yield Stop(NEVER, "cancelled")


@pytest.mark.parametrize("situation", SITUATIONS)
def test_what_nobody_waits_for_changes_nothing(situation: str) -> None:
    cluster = SITUATIONS[situation][1]()
    for event in strays(cluster):
        assert_ignored(cluster, event)


@pytest.mark.parametrize("situation", SITUATIONS)
def test_an_answer_that_is_heard_twice_counts_once(situation: str) -> None:
    for position in range(len(asked_about(SITUATIONS[situation][1]()))):
        cluster = SITUATIONS[situation][1]()
        message = asked_about(cluster)[position]
        take(cluster, message)
        answer = cluster.answer(message)
        assert answer is not None
        cluster.handle(answer)
        if message not in asked_about(cluster):  # otherwise this may be its next answer
            assert_ignored(cluster, answer)
