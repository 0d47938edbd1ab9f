"""Room on the workers' disks: what is worth writing, what is deleted first, and how it is counted."""

from __future__ import annotations

import pytest
from _simulated import Simulated, cluster_of, finish
from hypothesis import given
from hypothesis import strategies as st
from test_document_life import ask, prompt, stored
from test_spilling import crowd

from distkv_dask.messages import to_worker as to
from distkv_dask.messages.names import SpilledFile
from distkv_dask.scheduler.records.disks import BYTES_PER_SECOND, Tier

BLOCK_BYTES = 100


@pytest.mark.parametrize("slower", [1.01, 0.99])
def test_a_document_goes_to_disk_where_writing_and_reading_it_takes_less_time_than_computing(slower: float) -> None:
    cluster = stored([15, 15], 80)
    life = cluster.life
    spans = life.ledger.sequences[0].placement
    assert len({span.worker for span in spans}) == 2, "each worker writes its part at the same time"
    largest = max(span.tokens // life.config.block_tokens for span in spans) * BLOCK_BYTES
    compute = life.policy.model.of(spans[-1].worker).prefill(80)
    life.disks.disk.rate = 2 * largest * slower / compute  # written once, read once
    crowd(cluster, 9, 100, 9)
    assert life.requests[0].state.label == ("spilling" if slower > 1 else "dropped")


def spilled(cluster: Simulated, number: int) -> None:
    """Ingest a document of five blocks, and let it make room for a request."""
    cluster.ingest(number, prompt(number, 20))
    finish(cluster)
    make_room(cluster, 100 + number)


def make_room(cluster: Simulated, number: int) -> None:
    crowd(cluster, number, 40, 8)
    finish(cluster)


def copies(cluster: Simulated) -> list[int]:
    disks = cluster.life.disks
    assert disks.disk.used["w0"] == sum(copy.bytes["w0"] for copy in disks.copies.values())
    assert sum(map(len, cluster.disks["w0"].values())) * BLOCK_BYTES == disks.disk.used["w0"]
    return [*disks.copies]


def three_on_disk() -> Simulated:
    """A disk with three documents of five blocks, the last of which is also in memory, together with a fourth."""
    cluster = cluster_of(0, 12, spill=1500)
    for number in (0, 1, 2):
        spilled(cluster, number)
    assert copies(cluster) == [0, 1, 2]
    ask(cluster, 20, document=2, tokens=20)
    finish(cluster)
    assert cluster.life.requests[2].state.label == "document"
    assert copies(cluster) == [0, 1, 2], "the copy stays"
    cluster.ingest(3, prompt(3, 20))
    finish(cluster)
    return cluster


def test_a_copy_of_what_is_in_memory_makes_room_before_others() -> None:
    cluster = three_on_disk()
    ask(cluster, 21, document=2, tokens=20)  # now it was used last, and must stay in memory
    finish(cluster)
    crowd(cluster, 30, 20, 8)
    finish(cluster)
    assert [cluster.life.requests[number].state.label for number in (2, 3)] == ["document", "dropped"]
    assert copies(cluster) == [0, 1, 3]


def test_of_documents_that_are_on_disk_alone_the_one_not_used_for_longest_makes_room() -> None:
    cluster = three_on_disk()
    make_room(cluster, 30)  # both in memory are evicted
    assert copies(cluster) == [1, 2, 3]


def test_files_on_a_dead_workers_disk_are_not_deleted_by_anybody() -> None:
    cluster = stored([5, 5, 5], tokens=40)
    crowd(cluster, 9, 48, 9)
    finish(cluster)
    files = {file.worker for file in cluster.life.disks.copies[0].files}
    assert len(files) > 1
    victim = sorted(files)[0]
    commands = cluster.watch()
    cluster.lose_worker(victim)
    discarded = [one for one in commands if isinstance(one, to.Discard)]
    assert {one.worker for one in discarded} == files - {victim}
    assert not cluster.life.disks.copies
    assert victim not in cluster.life.disks.disk.capacity


@given(st.lists(st.tuples(st.integers(1, 10**9), st.floats(0.001, 100)), max_size=30))
def test_a_disk_is_as_fast_as_it_was_lately_and_never_faster_than_it_ever_was(writes: list[tuple[int, float]]) -> None:
    disks = Tier(BYTES_PER_SECOND)
    for size, seconds in writes:
        disks.wrote(size, seconds)
    rates = [BYTES_PER_SECOND, *(size / seconds for size, seconds in writes)]
    assert min(rates) * (1 - 1e-9) <= disks.rate <= max(rates) * (1 + 1e-9)
    for _ in range(30):
        disks.wrote(1000, 1.0)
    assert disks.rate == pytest.approx(1000, rel=1e-3, abs=0.03 * max(rates))
    disks.wrote(1000, 0.0)
    assert disks.rate == pytest.approx(1000, rel=1e-3, abs=0.03 * max(rates))


def test_what_is_written_lately_counts_for_less_than_half() -> None:
    disks = Tier(BYTES_PER_SECOND)
    disks.wrote(0, 1.0)
    assert BYTES_PER_SECOND / 2 < disks.rate < BYTES_PER_SECOND


def test_spilled_files_say_on_which_disk_they_are() -> None:
    cluster = stored([5, 5, 5], tokens=40)
    crowd(cluster, 9, 48, 9)
    finish(cluster)
    saved = cluster.life.requests[0].saved
    assert saved is not None
    assert all(isinstance(file, SpilledFile) for file in saved.files)
    assert [file.start for file in saved.files] == sorted(file.start for file in saved.files)
    for file in saved.files:
        assert file.name in cluster.disks[file.worker]  # type: ignore[union-attr]


def test_a_document_is_not_given_up_for_one_that_waits_for_a_place_in_a_batch() -> None:
    cluster = stored([60], 20)
    for number in range(1, 6):
        crowd(cluster, number, 8, 20)
        while cluster.chunks:
            cluster.run_chunk(cluster.chunks[0][0])
    assert cluster.life.requests[5].state.label == "waiting"
    assert cluster.life.requests[0].state.label == "document"
    finish(cluster)
    assert cluster.life.requests[0].state.label == "document"
