"""Requests in every state of the state machine, each in a small simulated cluster of two or three workers."""

from __future__ import annotations

from array import array
from collections.abc import Callable

from _happenings import ONE, OTHER, SPARE, asked_about, go_on, lose, state, workers_of
from _simulated import BLOCK, Simulated, cluster_of, finish

from distkv_dask.messages.from_worker import WindowStarted
from distkv_dask.messages.names import Saved
from distkv_dask.placement import Move
from distkv_dask.sampling import SamplingParams


def prompt(sequence: int, tokens: int) -> array[int]:
    return array("i", range(1000 * sequence, 1000 * sequence + tokens))


def submit(cluster: Simulated, number: int, tokens: int, new: int, priority: int = 0, **how: object) -> None:
    cluster.submit(number, prompt(number, tokens), SamplingParams(max_new_tokens=new, priority=priority), **how)


def until(cluster: Simulated, name: str, number: int = ONE) -> Simulated:
    for _ in range(500):
        if state(cluster, number) == name:
            return cluster
        assert cluster.step(), f"{number} is {state(cluster, number)} and never becomes {name}"
    raise AssertionError(name)


def waiting() -> Simulated:
    cluster = cluster_of(1, 8, 8)
    submit(cluster, OTHER, 44, 9)
    submit(cluster, ONE, 30, 9)
    return cluster


def prefill() -> Simulated:
    cluster = cluster_of(1, 8, 8)
    submit(cluster, ONE, 44, 9)
    return cluster


def last_chunk() -> Simulated:
    cluster = prefill()
    while len(cluster.chunks[0]) > 1:
        cluster.step()
    return cluster


def decode() -> Simulated:
    return until(prefill(), "Decode")


def running_window() -> Simulated:
    cluster = decode()
    (home,) = (home for home, queue in cluster.windows.items() if queue)
    cluster.handle(WindowStarted(home, cluster.windows[home][0].window))
    return cluster


def cancelled() -> Simulated:
    cluster = decode()
    cluster.stop(ONE)
    return cluster


def losing() -> Simulated:
    """It lost blocks, and waits for its workers."""
    cluster = cluster_of(1, 8, 8, 8)
    submit(cluster, ONE, 44, 9)
    until(cluster, "Decode")
    cluster.handle(lose(cluster, workers_of(cluster)[1] or ""))
    return cluster


def making_way() -> Simulated:
    """It is preempted by a more urgent one."""
    cluster = decode()
    submit(cluster, OTHER, 30, 9, priority=1)
    return cluster


def spilling() -> Simulated:
    return until(making_way(), "Spilling")


def on_disk() -> Simulated:
    """It waits, with its blocks on disk."""
    return until(making_way(), "Waiting")


def fetching() -> Simulated:
    return until(making_way(), "Fetching")


def interrupted() -> Simulated:
    """It retires while it reads files."""
    cluster = fetching()
    cluster.stop(ONE)
    return cluster


def keeping() -> Simulated:
    """It retires, and will become a document."""
    cluster = cluster_of(1, 8, 8)
    submit(cluster, ONE, 20, 9, keeps=True)
    until(cluster, "Decode")
    cluster.stop(ONE, "stop")
    return cluster


def keeping_little() -> Simulated:
    """It retires, and will become a document that is shorter than a block."""
    cluster = cluster_of(1, 8, 8)
    submit(cluster, ONE, 2, 9, keeps=True)
    until(cluster, "Decode")
    cluster.stop(ONE, "stop")
    return cluster


def losing_room() -> Simulated:
    """It lost room for tokens that are not generated yet."""
    cluster = cluster_of(1, 4, 4, 4)
    submit(cluster, ONE, 8, 20)
    until(cluster, "Decode")
    cluster.handle(lose(cluster, cluster.life.ledger.sequences[ONE].home))
    return cluster


def short() -> Simulated:
    """A document that is shorter than a block."""
    cluster = cluster_of(1, 8, 8)
    cluster.ingest(ONE, prompt(ONE, BLOCK - 1))
    return cluster


def ingested() -> Simulated:
    cluster = cluster_of(1, 8, 8)
    cluster.ingest(ONE, prompt(ONE, 40))
    return cluster


def stored() -> Simulated:
    return until(ingested(), "Stored")


def crowded() -> Simulated:
    """A document makes room by going to disk."""
    cluster = stored()
    submit(cluster, OTHER, 50, 9)
    return cluster


def dropped() -> Simulated:
    return until(crowded(), "Dropped")


def asked_again() -> Simulated:
    """A document on disk waits for room, and a question for the document."""
    cluster = dropped()
    cluster.submit(3, prompt(ONE, 40) + array("i", [7, 8]), SamplingParams(max_new_tokens=5), document=ONE)
    return cluster


def coming_back() -> Simulated:
    return until(asked_again(), "Fetching")


def question() -> Simulated:
    """A question waits for its document, which is being computed."""
    cluster = cluster_of(1, 8, 8)
    cluster.ingest(OTHER, prompt(OTHER, 40))
    cluster.submit(ONE, prompt(OTHER, 40) + array("i", [7, 8]), SamplingParams(max_new_tokens=9), document=OTHER)
    return cluster


def saving() -> Simulated:
    cluster = cluster_of(1, 8, 8)
    cluster.ingest(OTHER, prompt(OTHER, 40))
    finish(cluster)
    cluster.save(ONE, OTHER, Saved("folder", tag="s"))
    return cluster


def moving(phase: str, pauses: bool) -> Simulated:
    """Its blocks are moving to a third worker."""
    cluster = decode()
    cluster.add_worker(8)
    account = cluster.life.ledger.sequences[ONE]
    tail, head = account.placement[-1], account.placement[0]
    cluster.start_move(
        Move(ONE, tail.start, tail.stop, tail.worker, SPARE)
        if pauses
        else Move(ONE, head.start, head.start + 2 * BLOCK, head.worker, SPARE)
    )
    for _ in range(500):
        (one,) = cluster.life.moves.under_way.values()
        if one.phase == phase:
            return cluster
        (message,) = asked_about(cluster)
        go_on(cluster, message)
    raise AssertionError(phase)


def one_left(make: Callable[[], Simulated]) -> Callable[[], Simulated]:
    """All workers but one have answered."""

    def made() -> Simulated:
        cluster = make()
        while len(asked := asked_about(cluster)) > 1:
            go_on(cluster, asked[0])
        return cluster

    return made


def retired_first(make: Callable[[], Simulated]) -> Callable[[], Simulated]:
    """Its home has answered, and its holders are asked."""

    def made() -> Simulated:
        cluster = make()
        (message,) = asked_about(cluster)
        go_on(cluster, message)
        return one_left(lambda: cluster)()

    return made


SITUATIONS: dict[str, tuple[str, Callable[[], Simulated]]] = {
    "waiting": ("Waiting", waiting),
    "question": ("Waiting", question),
    "prefill": ("Prefill", prefill),
    "last chunk": ("Prefill", last_chunk),
    "decode": ("Decode", decode),
    "window": ("Decode", running_window),
    "cancelled": ("Retiring", cancelled),
    "cancelled, one left": ("Retiring", retired_first(cancelled)),
    "losing": ("Retiring", losing),
    "losing, one left": ("Retiring", retired_first(losing)),
    "making way": ("Retiring", making_way),
    "making way, one left": ("Retiring", retired_first(making_way)),
    "interrupted": ("Retiring", interrupted),
    "interrupted, one left": ("Retiring", one_left(interrupted)),
    "keeping": ("Retiring", keeping),
    "keeping, one left": ("Retiring", retired_first(keeping)),
    "keeping little, one left": ("Retiring", retired_first(keeping_little)),
    "losing room": ("Retiring", losing_room),
    "spilling": ("Spilling", spilling),
    "spilling, one left": ("Spilling", one_left(spilling)),
    "on disk": ("Waiting", on_disk),
    "fetching": ("Fetching", fetching),
    "fetching, one left": ("Fetching", one_left(fetching)),
    "saving": ("Saving", saving),
    "saving, one left": ("Saving", one_left(saving)),
    "ingested": ("Prefill", ingested),
    "stored": ("Stored", stored),
    "short": ("Stored", short),
    "crowded": ("Spilling", crowded),
    "crowded, one left": ("Spilling", one_left(crowded)),
    "dropped": ("Dropped", dropped),
    "asked again": ("Waiting", asked_again),
    "coming back": ("Fetching", coming_back),
    "coming back, one left": ("Fetching", one_left(coming_back)),
    "expecting": ("Decode", lambda: moving("expecting", False)),
    "sending": ("Decode", lambda: moving("sending", False)),
    "switching": ("Decode", lambda: moving("switching", False)),
    "expecting with a pause": ("Decode", lambda: moving("expecting", True)),
    "pausing": ("Decode", lambda: moving("pausing", True)),
    "sending with a pause": ("Decode", lambda: moving("sending", True)),
}
"""Name of a situation -> the state of sequence :data:`ONE`, and the function that leads to it."""
