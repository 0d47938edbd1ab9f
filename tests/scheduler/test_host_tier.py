"""The host tier: blocks that make room on a card go to host memory first, and from there to disk."""

from __future__ import annotations

import pytest
from _simulated import Simulated, assert_nothing_left, cluster_of, finish
from test_disk_room import BLOCK_BYTES, spilled
from test_document_life import ask

from distkv_dask.messages import to_worker as to
from distkv_dask.messages.names import HOST_MEMORY, OWN_DISK

DOCUMENT = 5 * BLOCK_BYTES


def cluster_with(host: int, spill: int) -> Simulated:
    """One worker with room for two documents of five blocks."""
    return cluster_of(0, 12, spill=spill, host_memory=host)


def where(cluster: Simulated) -> tuple[list[int], list[int]]:
    """Documents whose copies are in host memory and on disk; also checks that they are counted correctly."""
    disks = cluster.life.disks
    for tier, files in ((disks.memory, cluster.hosts), (disks.disk, cluster.disks)):
        assert tier.used["w0"] == sum(map(len, files["w0"].values())) * BLOCK_BYTES
    copies = disks.copies.items()
    return [n for n, one in copies if "w0" in one.in_memory], [n for n, one in copies if "w0" not in one.in_memory]


def test_host_memory_is_filled_before_the_disk_and_its_oldest_copies_go_on_to_the_disk() -> None:
    cluster = cluster_with(2 * DOCUMENT, 10 * DOCUMENT)
    commands = cluster.watch()
    for number in range(4):
        spilled(cluster, number)
    assert where(cluster) == ([2, 3], [0, 1])
    assert {one.saved.place for one in commands if isinstance(one, to.Store)} == {HOST_MEMORY}
    assert [one for one in commands if isinstance(one, to.Fetch)] == []


def test_a_copy_comes_back_from_where_it_is_and_its_answer_is_right() -> None:
    cluster = cluster_with(2 * DOCUMENT, 10 * DOCUMENT)
    for number in range(4):
        spilled(cluster, number)
    for at, document in enumerate((0, 3)):
        ask(cluster, 20 + at, document=document, tokens=20)
        finish(cluster)
        assert cluster.ends[20 + at] == ("stop", None) or cluster.ends[20 + at] == ("length", None)
        assert cluster.reused[20 + at] == 20, "it was read, not computed"
    for number in range(4):
        cluster.stop(number)
    finish(cluster)
    assert_nothing_left(cluster)


def test_what_is_used_again_stays_in_host_memory_longer() -> None:
    cluster = cluster_with(2 * DOCUMENT, 10 * DOCUMENT)
    for number in (0, 1):
        spilled(cluster, number)
    ask(cluster, 20, document=0, tokens=20)
    finish(cluster)
    spilled(cluster, 2)
    spilled(cluster, 3)
    in_memory, on_disk = where(cluster)
    assert 1 in on_disk
    assert 3 in in_memory


def test_without_a_disk_the_oldest_copy_is_given_up_instead() -> None:
    cluster = cluster_with(2 * DOCUMENT, 0)
    for number in range(4):
        spilled(cluster, number)
    assert where(cluster) == ([2, 3], [])
    assert not cluster.disks["w0"]


@pytest.mark.parametrize("host", [0, DOCUMENT - 1])
def test_what_host_memory_cannot_take_goes_to_disk(host: int) -> None:
    cluster = cluster_with(host, 10 * DOCUMENT)
    commands = cluster.watch()
    spilled(cluster, 0)
    assert where(cluster) == ([], [0])
    assert {one.saved.place for one in commands if isinstance(one, to.Store)} == {OWN_DISK}


@pytest.mark.parametrize("rate", [1e-3, 1e12])
def test_a_copy_in_host_memory_pays_by_the_speed_of_host_memory(rate: float) -> None:
    cluster = cluster_with(2 * DOCUMENT, 10 * DOCUMENT)
    cluster.life.disks.disk.rate = 1e-3
    cluster.life.disks.memory.rate = rate
    spilled(cluster, 0)
    assert where(cluster) == (([0], []) if rate > 1 else ([], []))


def test_a_released_document_leaves_nothing_in_host_memory() -> None:
    cluster = cluster_with(2 * DOCUMENT, 10 * DOCUMENT)
    for number in range(3):
        spilled(cluster, number)
        cluster.stop(number)
    finish(cluster)
    assert_nothing_left(cluster)
