"""Blocks spilled to disk to make room: documents and preempted requests are restored unchanged, or recomputed."""

from __future__ import annotations

import pytest
from _simulated import Simulated, assert_nothing_left, cluster_of, expected, finish
from test_document_life import ask, prompt, stored, used

from distkv_dask.errors import GangAbortedError
from distkv_dask.sampling import SamplingParams


def crowd(cluster: Simulated, number: int, tokens: int, new: int, priority: int = 0) -> None:
    """A request that has nothing in common with others."""
    sampling = SamplingParams(max_new_tokens=new, priority=priority)
    cluster.submit(number, prompt(number, tokens), sampling)


def computed(cluster: Simulated, number: int) -> int:
    """Tokens of a sequence's KV that are waiting to be computed."""
    return sum(len(chunk.tokens) for chain in cluster.chunks for chunk in chain if chunk.sequence == number)


def spilled(capacities: list[int], tokens: int = 40) -> Simulated:
    """A cluster whose document 0 made room, and is on disk."""
    cluster = stored(capacities, tokens)
    crowd(cluster, 9, 4 * sum(capacities) - 12, 9)
    finish(cluster)
    assert cluster.ends.pop(9) == ("length", None)
    assert cluster.life.requests[0].state.label == "dropped"
    return cluster


def test_a_document_comes_back_from_the_disks_of_all_workers_without_being_computed() -> None:
    cluster = spilled([5, 5, 5])
    assert sum(map(len, cluster.disks.values())) >= 2
    ask(cluster, 1, tokens=40)
    assert not computed(cluster, 0)
    while cluster.life.requests[0].state.label != "document":
        assert cluster.step()
        assert not computed(cluster, 0)
    finish(cluster)
    assert cluster.tokens[1] == expected(1, 5)
    assert cluster.reused[1] == 40


def test_a_document_that_is_on_disk_already_makes_room_at_once() -> None:
    cluster = spilled([15])
    ask(cluster, 1, tokens=40)
    finish(cluster)
    crowd(cluster, 2, 48, 9)
    assert not cluster.files
    assert cluster.life.requests[0].state.label == "dropped"
    cluster.stop(0)
    assert not any(cluster.disks.values()), "a released document leaves no files"


def test_who_asks_while_a_document_goes_to_disk_is_answered() -> None:
    cluster = stored([15], 40)
    crowd(cluster, 9, 48, 9)
    assert cluster.life.requests[0].state.label == "spilling"
    ask(cluster, 1, tokens=40)
    finish(cluster)
    assert cluster.tokens[1] == expected(1, 5)
    assert cluster.reused[1] == 40


def test_a_document_whose_disk_died_is_computed_anew_and_its_other_files_go() -> None:
    cluster = spilled([5, 5, 5])
    victim = next(worker for worker, files in cluster.disks.items() if files)
    cluster.lose_worker(victim)
    assert not any(cluster.disks.values())
    cluster.add_worker(9)
    ask(cluster, 1, tokens=40)
    assert computed(cluster, 0) == 40
    finish(cluster)
    assert cluster.tokens[1] == expected(1, 5)


def test_a_disk_that_is_too_slow_is_not_waited_for() -> None:
    cluster = stored([15], 40)
    crowd(cluster, 9, 48, 9)
    late = cluster.files.copy()
    cluster.files.clear()
    cluster.tick(cluster.life.config.timeout_start + 1)
    assert cluster.life.requests[0].state.label == "dropped"
    cluster.files = late
    finish(cluster)
    assert cluster.ends[9] == ("length", None)
    assert not any(cluster.disks.values()), "what comes too late is deleted"


def test_without_disk_nothing_is_written() -> None:
    cluster = cluster_of(0, 15, spill=0)
    cluster.ingest(0, prompt(0, 40))
    finish(cluster)
    crowd(cluster, 9, 48, 9)
    assert cluster.life.requests[0].state.label == "dropped"
    finish(cluster)
    assert cluster.ends[9] == ("length", None)


def running(priority: int = 0, capacity: int = 15) -> Simulated:
    """A worker with one request, which takes nearly all of its room and decodes."""
    cluster = cluster_of(3, capacity)
    crowd(cluster, 1, 20, 21, priority)
    while len(cluster.tokens[1]) < 5:
        cluster.step()
    return cluster


@pytest.mark.parametrize("disk", ["works", "is full", "loses the file"])
def test_an_urgent_request_goes_first_and_the_other_goes_on_where_it_was(disk: str) -> None:
    cluster = running()
    if disk == "is full":
        cluster.life.disks.disk.capacity["w0"] = 10
    before = list(cluster.tokens[1])
    crowd(cluster, 2, 20, 9, priority=1)
    while cluster.life.requests[1].state.label != "waiting":
        assert cluster.step()
    if disk == "loses the file":
        cluster.lose_file()
    computed_again = False
    while cluster.step():
        computed_again |= computed(cluster, 1) > 0
    assert list(cluster.ends) == [2, 1]
    assert cluster.tokens[1] == expected(1, 21)
    assert cluster.tokens[1][: len(before)] == before
    assert computed_again == (disk != "works")
    assert not any(cluster.disks.values())


@pytest.mark.parametrize(
    ("priority", "tokens", "wait"), [(0, 20, 0.0), (1, 20, 120.0)], ids=["no more urgent", "came too long after"]
)
def test_a_request_does_not_make_way_for_one_that_is(priority: int, tokens: int, wait: float) -> None:
    cluster = running()
    cluster.now += wait
    crowd(cluster, 2, tokens, 9, priority=priority)
    assert not cluster.retirements
    finish(cluster)
    assert list(cluster.ends) == [1, 2]


def test_one_request_makes_way_for_a_place_in_a_full_batch() -> None:
    cluster = cluster_of(3, 60)
    for number in range(1, 5):
        crowd(cluster, number, 8, 20)
    while not all(live.state.label == "decode" for live in cluster.life.requests.values()):
        assert cluster.step()
    crowd(cluster, 5, 8, 20, priority=1)
    making_way = 0
    while 5 not in cluster.ends:
        making_way = max(making_way, sum(live.state.label != "decode" for live in cluster.life.requests.values()) - 1)
        assert cluster.step()
    finish(cluster)
    assert making_way <= 1
    assert [cluster.tokens[number] for number in range(1, 6)] == [expected(number, 20) for number in range(1, 6)]


def test_nobody_makes_way_where_that_would_not_be_enough() -> None:
    cluster = cluster_of(3, 15, 15)
    crowd(cluster, 1, 50, 40, priority=1)
    crowd(cluster, 2, 10, 3)
    while cluster.life.requests[1].state.label != "decode" or not cluster.tokens[1]:
        cluster.step()
    crowd(cluster, 3, 60, 40, priority=1)
    assert all(live.state.label != "retiring" for live in cluster.life.requests.values())
    finish(cluster)
    assert {reason for reason, _ in cluster.ends.values()} <= {"length", "stop"}


def test_a_preempted_request_can_be_cancelled_on_its_way_to_disk_and_back() -> None:
    for state in ("retiring", "spilling", "waiting", "fetching"):
        cluster = running()
        crowd(cluster, 2, 20, 3, priority=1)
        while cluster.life.requests[1].state.label != state:
            assert cluster.step()
        for _ in range(2):
            cluster.stop(1)
        finish(cluster)
        assert cluster.ends[1] == ("cancelled", None)
        assert cluster.ends[2] == ("length", None)
        assert_nothing_left(cluster)


def test_a_preempted_request_survives_the_loss_of_a_worker_on_its_way_to_disk() -> None:
    cluster = cluster_of(5, 8, 8)
    crowd(cluster, 1, 40, 21)
    while not cluster.tokens[1]:
        cluster.step()
    assert len({span.worker for span in cluster.life.ledger.sequences[1].placement}) == 2
    crowd(cluster, 2, 20, 3, priority=1)
    while cluster.life.requests[1].state.label != "spilling":
        assert cluster.step()
    cluster.lose_worker()
    cluster.add_worker(8)
    finish(cluster)
    assert cluster.ends == {2: ("length", None), 1: ("length", None)}
    assert cluster.tokens[1] == expected(1, 21)
    assert used(cluster) == 0
    assert not any(cluster.disks.values())


def test_a_gang_that_fails_while_a_request_is_preempted_changes_nothing() -> None:
    cluster = running()
    crowd(cluster, 2, 20, 3, priority=1)
    cluster.fail_some_gang(GangAbortedError("a peer was silent"))
    finish(cluster)
    assert cluster.tokens[1] == expected(1, 21)
    assert cluster.ends == {2: ("length", None), 1: ("length", None)}


def test_copies_that_are_needed_least_make_room_on_a_full_disk() -> None:
    cluster = cluster_of(0, 12, spill=1100)
    for number in (0, 1):
        cluster.ingest(number, prompt(number, 20))
        finish(cluster)
        cluster.ends.pop(number)
        crowd(cluster, 10 + number, 40, 8)
        finish(cluster)
    assert [len(cluster.life.requests[number].saved or ()) > 0 for number in (0, 1)] == [True, True]
    cluster.ingest(2, prompt(2, 20))
    finish(cluster)
    crowd(cluster, 12, 40, 8)
    finish(cluster)
    assert [cluster.life.requests[number].saved is not None for number in (0, 1, 2)] == [False, True, True]
    for number in (0, 1, 2):
        ask(cluster, 20 + number, document=number)
        finish(cluster)
        assert cluster.tokens[20 + number] == expected(20 + number, 5)


def test_what_is_computed_as_fast_as_it_is_read_is_not_written() -> None:
    cluster = stored([15], 40)
    cluster.life.block_bytes = 10**9
    cluster.life.disks.disk.capacity["w0"] = 10**12
    crowd(cluster, 9, 48, 9)
    assert cluster.life.requests[0].state.label == "dropped"
    assert not cluster.files
