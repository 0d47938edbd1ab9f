"""Lower tiers of the prefix cache: what is copied where, what is restored or evicted first, and what faults cost."""

from __future__ import annotations

import random
from array import array
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from _simulated import BLOCK, Simulated, assert_nothing_left, cluster_of, expected, finish

from distkv_dask.messages import to_worker as to
from distkv_dask.sampling import SamplingParams
from distkv_dask.scheduler import commands as do
from distkv_dask.scheduler.cache import copies, restore, retention
from distkv_dask.scheduler.costs.presets import PRESET
from distkv_dask.scheduler.engines.status import tiers_of
from distkv_dask.scheduler.records.extents import RESTS

TIERS: dict[str, Any] = {"prefix_cache_tier": "disk", "spill": 10_000}


@pytest.fixture(autouse=True)
def small_extents(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copies, "EXTENT_TOKENS", 2 * BLOCK)


def text(seed: int, tokens: int) -> array[int]:
    return array("i", (random.Random(seed).randrange(10**6) for _ in range(tokens)))


def ask(cluster: Simulated, number: int, prompt: array[int], new: int = 5) -> Counter[str]:
    """Answer a request, and make the copies that follow; returns reused tokens by tier."""
    commands = cluster.watch()
    cluster.submit(number, prompt, SamplingParams(max_new_tokens=new))
    finish(cluster)
    assert cluster.tokens[number] == expected(number, new)
    found: Counter[str] = Counter()
    for command in commands:
        if isinstance(command, do.Count) and command.total.startswith("reused_"):
            found[command.total.split("_")[1]] += command.more
    assert cluster.reused[number] == found.total()
    return found


def computed(commands: list[do.Command]) -> list[tuple[int, int]]:
    """Ranges of tokens of all chunks."""
    chunks = [chunk for command in commands if isinstance(command, do.SubmitPrefill) for chunk in command.chunks]
    return [(chunk.start, chunk.stop) for chunk in chunks]


def with_attention(cluster: Simulated) -> None:
    """Make late tokens much more expensive to compute than early ones, as in long texts."""
    curve = replace(PRESET.curve, prompt=1e-5, pair=1e-3)
    cluster.life.know_costs(replace(PRESET, curve=curve))


def kinds(cluster: Simulated) -> Counter[str]:
    return Counter(one.kind for one in cluster.life.extents.by_number.values() for _ in one.keys)


def test_what_has_to_make_room_comes_back_from_disk_and_only_the_rest_is_computed() -> None:
    cluster = cluster_of(0, 10, **TIERS)
    assert not ask(cluster, 1, text(1, 36))
    assert kinds(cluster) == {"disk": 10}
    assert not ask(cluster, 2, text(2, 36))  # takes all blocks
    assert ask(cluster, 3, text(1, 36)) == {"disk": 32}
    assert computed(cluster.seen) == [(32, 36)]
    assert_nothing_left(cluster)


def test_the_status_counts_what_is_on_disk_not_what_is_still_being_written() -> None:
    cluster = cluster_of(0, 10, **TIERS)
    cluster.submit(1, text(1, 36), SamplingParams(max_new_tokens=5))
    told = list[tuple[int, int]]()
    while cluster.step():
        written = sum(map(len, cluster.disks["w0"].values()))
        told.append((tiers_of(cluster.life, "w0")["disk"], written))
    assert told[-1] == (10, 10)
    assert all(said == written for said, written in told)


def test_a_chat_goes_on_where_it_was_though_others_took_its_room() -> None:
    cluster = cluster_of(0, 16, **TIERS)
    chats, number = {seed: text(seed, 20) for seed in range(4)}, 0
    for turn in range(4):
        for seed, prompt in chats.items():
            number += 1
            found = ask(cluster, number, prompt, new=4)
            assert found.total() == (0 if turn == 0 else (len(prompt) - 3 - 1) // BLOCK * BLOCK), (turn, seed)
            chats[seed] = prompt + array("i", [*cluster.tokens[number], *text(number, 3)])
    assert_nothing_left(cluster)


def full_and_empty(**config: Any) -> Simulated:
    """A small worker with a text in its cache, and a larger worker with copies of it."""
    cluster = cluster_of(0, 10, **TIERS | config)
    cluster.submit(1, text(1, 36), SamplingParams(max_new_tokens=5))
    cluster.add_worker(40)
    finish(cluster)
    assert kinds(cluster) == {"workers": 10}
    return cluster


def reading_copies() -> Simulated:
    """The same, while request 3 reads these copies, because another text took the room of the first."""
    cluster = full_and_empty(spill=0)
    cluster.life.ledger.retire_worker("w1")
    ask(cluster, 2, text(2, 36))
    cluster.submit(3, text(1, 36), SamplingParams(max_new_tokens=5))
    return cluster


def test_copies_on_other_workers_are_read_from_there() -> None:
    cluster = full_and_empty()
    cluster.life.ledger.retire_worker("w1")  # the next requests go to w0
    assert not ask(cluster, 2, text(2, 36))
    cluster.life.ledger.retire_worker("w1", False)
    found = ask(cluster, 3, text(1, 36))
    assert found == {"workers": 32}
    assert_nothing_left(cluster)


def test_copies_on_other_workers_give_way_at_once() -> None:
    cluster = full_and_empty(spill=0)
    cluster.submit(2, text(2, 150), SamplingParams(max_new_tokens=5))
    assert cluster.life.requests[2].state.label == "prefill"
    assert not kinds(cluster)["workers"]
    finish(cluster)
    assert cluster.tokens[2] == expected(2, 5)
    assert_nothing_left(cluster)


def test_copies_of_a_worker_that_dies_are_computed_again() -> None:
    cluster = full_and_empty()
    cluster.life.ledger.retire_worker("w1")
    ask(cluster, 2, text(2, 36))
    cluster.life.ledger.retire_worker("w1", False)
    cluster.lose_worker("w1")
    assert not kinds(cluster)["workers"]
    ask(cluster, 3, text(1, 36))
    assert_nothing_left(cluster)


def test_a_worker_that_dies_while_its_copies_are_read_costs_only_time() -> None:
    cluster = reading_copies()
    assert cluster.life.requests[3].state.label == "fetching"
    cluster.lose_worker("w1")
    finish(cluster)
    assert cluster.tokens[3] == expected(3, 5)
    assert cluster.reused[3] == 0
    assert_nothing_left(cluster)


def test_what_is_given_up_while_it_is_read_is_not_used() -> None:
    cluster = reading_copies()
    cluster.life.ledger.retire_worker("w1", False)
    cluster.submit(4, text(4, 150), SamplingParams(max_new_tokens=5))  # takes w1's blocks
    assert not kinds(cluster)
    finish(cluster)
    assert [cluster.tokens[number] for number in (3, 4)] == [expected(3, 5), expected(4, 5)]
    assert cluster.reused[3] == 0
    assert_nothing_left(cluster)


def test_where_the_disk_is_full_a_text_loses_its_front_and_only_that_is_computed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cluster = cluster_of(0, 12, **TIERS | {"spill": 1200})  # twelve blocks
    with_attention(cluster)
    ask(cluster, 1, text(1, 44), new=1)
    ask(cluster, 2, text(2, 28), new=1)
    kept = [one for one in cluster.life.extents.by_number.values() if one.tokens[0] == text(1, 1)[0]]
    assert min(one.start for one in kept) > 0
    assert max(one.stop for one in kept) == 44
    monkeypatch.setattr(copies, "AHEAD", -1.0)
    ask(cluster, 3, text(3, 47), new=1)  # takes all blocks
    found = ask(cluster, 4, text(1, 44) + text(4, 2), new=1)
    assert 0 < found["disk"] < 44
    assert computed(cluster.seen)[0][0] == 0, "the front alone, before what is new"
    assert (44, 46) in computed(cluster.seen)
    assert sum(stop - start for start, stop in computed(cluster.seen)) == 46 - found["disk"]
    assert_nothing_left(cluster)


def test_a_disk_that_cannot_be_written_to_is_left_alone_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = cluster_of(0, 10, **TIERS)
    cluster.refusing = True
    monkeypatch.setattr(cluster.rng, "random", lambda: 0.0)  # every write fails
    cluster.submit(1, text(1, 36), SamplingParams(max_new_tokens=5))
    finish(cluster)
    assert cluster.life.extents.failed["w0"][1] == "OSError"
    assert not kinds(cluster)
    assert not cluster.life.disks.disk.used
    monkeypatch.undo()
    cluster.refusing = False
    commands = cluster.watch()
    ask(cluster, 2, text(1, 36))
    assert not any(isinstance(command, to.Store) for command in commands)
    cluster.now += RESTS
    ask(cluster, 3, text(3, 36))
    assert kinds(cluster)["disk"]
    assert "w0" not in cluster.life.extents.failed
    assert_nothing_left(cluster)


def test_a_damaged_file_is_computed_again_and_not_read_twice() -> None:
    cluster = cluster_of(0, 10, **TIERS)
    ask(cluster, 1, text(1, 36))
    ask(cluster, 2, text(2, 36))
    for name in list(cluster.disks["w0"]):
        cluster.drop_file("w0", name)
    assert not ask(cluster, 3, text(1, 36))
    assert computed(cluster.seen)[0][0] == 0
    assert_nothing_left(cluster)


def test_documents_take_the_disks_room_from_copies() -> None:
    cluster = cluster_of(0, 10, **TIERS | {"spill": 1000})
    ask(cluster, 1, text(1, 36))
    assert kinds(cluster) == {"disk": 10}
    cluster.ingest(2, text(2, 36))
    finish(cluster)
    cluster.ingest(3, text(3, 36))
    finish(cluster)
    assert cluster.life.disks.disk.used["w0"] <= 1000
    assert any(name.startswith("2-") for name in cluster.disks["w0"])
    for number in (2, 3):
        cluster.stop(number)
    assert_nothing_left(cluster)


@pytest.mark.parametrize(
    ("tier", "wanted"), [("memory", set()), ("workers", {"workers"}), ("disk", {"disk", "workers"})]
)
def test_kv_goes_no_further_down_than_the_setting_says(tier: str, wanted: set[str]) -> None:
    cluster = cluster_of(0, 10, prefix_cache_tier=tier)
    cluster.submit(1, text(1, 36), SamplingParams(max_new_tokens=5))
    cluster.add_worker(14)
    finish(cluster)
    assert bool(kinds(cluster)) == bool(wanted)
    ask(cluster, 2, text(2, 30))
    ask(cluster, 3, text(3, 30))
    assert set(kinds(cluster)) <= wanted
    assert_nothing_left(cluster)


def test_a_copy_that_would_take_longer_to_read_than_to_compute_is_not_made() -> None:
    cluster = cluster_of(0, 10, **TIERS)
    cluster.life.disks.disk.rate = 1.0
    ask(cluster, 1, text(1, 36))
    assert not kinds(cluster)


def test_a_copy_that_takes_too_long_is_given_up() -> None:
    cluster = cluster_of(0, 10, **TIERS)
    cluster.submit(1, text(1, 36), SamplingParams(max_new_tokens=5))
    while not cluster.files:
        cluster.step()
    cluster.tick(cluster.life.config.timeout_start + 1)
    assert not kinds(cluster)
    finish(cluster)
    assert not any(cluster.disks.values())
    assert_nothing_left(cluster)


def test_a_beginning_of_the_same_hash_is_not_taken_for_another(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = cluster_of(0, 10, **TIERS)
    ask(cluster, 1, text(1, 36))
    ask(cluster, 2, text(2, 36))
    keys = [key for one in cluster.life.extents.by_number.values() if one.tokens[:4] == text(1, 4) for key in one.keys]
    monkeypatch.setattr(restore, "chain", lambda tokens, size, adapter: iter(keys[: len(tokens) // size]))
    assert not ask(cluster, 3, text(3, 36))


def test_late_blocks_are_worth_more_and_old_ones_less() -> None:
    cluster = cluster_of(0, 10, **TIERS)
    with_attention(cluster)
    life = cluster.life
    life.now = 100.0
    early, late = (retention.recomputed(life, "w0", at, at + 4) for at in (0, 400))
    assert retention.value(life, late, 50.0) > retention.value(life, early, 50.0) > retention.value(life, early, 10.0)
