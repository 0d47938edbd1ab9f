"""Events for a request in some state (:mod:`_situations`): answers of workers, actions of users, faults."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from _simulated import Simulated

from distkv_dask.errors import GangAbortedError
from distkv_dask.messages import from_worker as did
from distkv_dask.messages import to_worker as to
from distkv_dask.messages.names import Transfer
from distkv_dask.placement import Endpoint
from distkv_dask.scheduler.lifecycle.events import (
    Drain,
    Event,
    Pause,
    Stop,
    StopAll,
    Tick,
    WorkerLost,
    WorkerReady,
)
from distkv_dask.simulate.workers import Asked

ONE, OTHER = 1, 2
"""The sequence in the state, and the one that caused the state."""

SPARE = "w2"
"""A worker that holds nothing, if there is one."""


def state(cluster: Simulated, number: int = ONE) -> str:
    """The name of a request's state class."""
    request = cluster.life.requests.get(number)
    return "gone" if request is None else type(request.state).__name__


def workers_of(cluster: Simulated) -> tuple[str | None, str | None]:
    """The home of the sequence, and a worker that holds blocks for it; None for one that is dead."""
    account = cluster.life.ledger.sequences.get(ONE)
    if account is None:
        return None, None
    holders = [span.worker for span in account.placement if span.worker != account.home]
    home, holder = (one if one in cluster.pools else None for one in (account.home, next(iter(holders), None)))
    return home, holder


def lose(cluster: Simulated, worker: str) -> WorkerLost:
    """Kill a worker; returns the event that the gManager gets."""
    cluster.remove(worker)
    cluster.retirements = [one for one in cluster.retirements if one[0] != worker]
    return WorkerLost(worker)


def asked_about(cluster: Simulated) -> list[Asked]:
    """Messages about the sequence that workers have not answered yet."""
    everything = [*(to.Retire(*one) for one in cluster.retirements), *cluster.moves, *cluster.files]
    return [
        one
        for one in everything
        if one.sequence == ONE
        or (isinstance(one, to.Store) and state(cluster) == "Saving" and one.transfer == Transfer("save", ONE))
    ]


def take(cluster: Simulated, message: Asked) -> None:
    """Remove a message that a worker answers, so that it is answered once."""
    for bag in (cluster.moves, cluster.files):
        if message in bag:
            bag.remove(message)  # type: ignore[arg-type]
    cluster.retirements = [one for one in cluster.retirements if to.Retire(*one) != message]


def go_on(cluster: Simulated, message: Asked) -> None:
    take(cluster, message)
    cluster.go_on(message)


# Events


def chunk(cluster: Simulated) -> Event | None:
    """The next chunk of its prompt is done."""
    head = cluster.head(ONE)
    return cluster.compute(head) if head is not None else None


def window(cluster: Simulated) -> Event | None:
    """The home's window is done, with three tokens for each sequence."""
    queued = next((queue[0] for queue in cluster.windows.values() if queue), None)
    if queued is None:
        return None
    accounts = cluster.life.ledger.sequences  # placements at the beginning of the window
    parts = {number: (3, accounts[number].placement) for number in cluster.batches[queued.gang.home]}
    return cluster.decode(queued, parts, 3, 0.15)


def failing(error: Exception) -> Callable[[Simulated], Event | None]:
    """One of its gangs fails."""

    def fail(cluster: Simulated) -> Event | None:
        head = cluster.head(ONE)
        queued = [queue[0] for home, queue in cluster.windows.items() if queue and ONE in cluster.batches[home]]
        gangs = [one.gang for one in (head, *queued) if one is not None]
        return did.GangFailed(gangs[0].home, gangs[0].number, error) if gangs else None

    return fail


def answer(kind: type, **otherwise: object) -> Callable[[Simulated], Event | None]:
    """A worker answers a message about it, or reports that it failed."""

    def answered(cluster: Simulated) -> Event | None:
        message = next((one for one in asked_about(cluster) if isinstance(one, kind)), None)
        if message is None:
            return None
        take(cluster, message)
        event = cluster.answer(message)
        if isinstance(event, did.Stored) and otherwise:
            for file in event.files:
                cluster.drop_file(event.worker, file.name)
        return replace(event, **otherwise) if event is not None else None

    return answered


def losing(of_home: bool) -> Callable[[Simulated], Event | None]:
    """A worker that has blocks of it dies."""

    def lost(cluster: Simulated) -> Event | None:
        home, holder = workers_of(cluster)
        worker = home if of_home else holder
        return None if worker is None else lose(cluster, worker)

    return lost


def target_lost(cluster: Simulated) -> Event | None:
    """The worker to which its blocks are moving dies."""
    return lose(cluster, SPARE) if cluster.life.moves.of(ONE) else None


def joined(cluster: Simulated) -> Event:
    cluster.add("new")
    return WorkerReady(Endpoint("new", "127.0.0.1", 1), 16)


def late(cluster: Simulated) -> Event:
    cluster.now += cluster.life.config.timeout_start + 1
    return Tick()


ABORTED, FAULT = GangAbortedError("a peer was silent"), ValueError("a fault")
EVENTS: dict[str, Callable[[Simulated], Event | None]] = {
    "chunk": chunk,
    "window": window,
    "aborted": failing(ABORTED),
    "fault": failing(FAULT),
    "retired": answer(to.Retire),
    "expected": answer(to.Expect),
    "refused": answer(to.Expect, refusal="no room"),
    "sent": answer(to.Send),
    "not sent": answer(to.Send, failure="not expected"),
    "relocated": answer(to.Relocate),
    "stored": answer(to.Store),
    "not stored": answer(to.Store, files=(), error=OSError("the disk is full")),
    "fetched": answer(to.Fetch),
    "not fetched": answer(to.Fetch, error=OSError("not on any disk")),
    "stop": lambda cluster: Stop(ONE, "stop"),
    "cancel": lambda cluster: Stop(ONE, "cancelled"),
    "close": lambda cluster: StopAll(),
    "home lost": losing(True),
    "holder lost": losing(False),
    "target lost": target_lost,
    "joined": joined,
    "drain": lambda cluster: Drain("w1", True),
    "pause": lambda cluster: Pause(frozenset(["w1"])),
    "tick": lambda cluster: Tick(),
    "late": late,
}
