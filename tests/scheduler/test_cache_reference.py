"""The prefix cache against a slow reference: what is kept, what is evicted first, and what is found again."""

from __future__ import annotations

from array import array
from dataclasses import dataclass

import pytest
from _examples import examples
from _simulated import BLOCK, Simulated, assert_nothing_left, cluster_of, expected, finish, settle
from hypothesis import given, settings
from hypothesis import strategies as st

from distkv_dask.placement import Span
from distkv_dask.sampling import SamplingParams
from distkv_dask.scheduler.cache import beginnings, prefix_cache
from distkv_dask.scheduler.records import prefix_index

CAPACITY = 12


@dataclass
class Node:
    """Blocks ``[start, stop)`` of a prompt of a kind, cached after those of its parent."""

    kind: int
    start: int
    stop: int
    parent: Node | None


class Slow:
    """One worker's cache, as a list of nodes in the order of eviction."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []

    @property
    def blocks(self) -> int:
        return sum(node.stop - node.start for node in self.nodes)

    def ask(self, kind: int, blocks: int) -> int:
        """Blocks that a request for a prompt of ``blocks`` whole blocks finds; others are computed, and cached."""
        leaf = max((node for node in self.nodes if node.kind == kind), key=lambda node: node.stop, default=None)
        path = []
        while leaf is not None:
            path.append(leaf)
            leaf = leaf.parent
        while path and path[0].start >= blocks:
            del path[0]  # it is longer than the prompt
        found = min(path[0].stop, blocks) if path else 0
        others = [node for node in self.nodes if node not in path]
        self.nodes = [*others, *path]
        self.make_room(CAPACITY - (blocks + 1) + found, path, found)
        if found < blocks:
            path.insert(0, Node(kind, found, blocks, path[0] if path else None))
        self.nodes = [*(node for node in self.nodes if node not in path), *path]
        return found

    def make_room(self, left: int, used: list[Node], found: int) -> None:
        """Evict blocks until at most ``left`` remain, but none of the ``used`` nodes before position ``found``."""
        while (more := self.blocks - left) > 0:
            first = next(node for node in self.nodes if node not in used or node.stop > found)
            self.cut(first, max(found if first in used else first.start, first.stop - more))

    def cut(self, node: Node, stop: int) -> None:
        for child in [child for child in self.nodes if child.parent is node and child.start > stop]:
            self.cut(child, child.start)
        node.stop = stop
        if node.start == stop:
            self.nodes.remove(node)


def ask(cluster: Simulated, number: int, kind: int, blocks: int) -> int:
    """Blocks that a request for this prompt reuses."""
    prompt = array("i", [*(1000 * kind + at for at in range(blocks * BLOCK)), 7])
    cluster.submit(number, prompt, SamplingParams(max_new_tokens=1))
    finish(cluster)
    assert cluster.tokens[number] == expected(number, 1)
    return cluster.reused[number] // BLOCK


kinds = st.tuples(st.integers(0, 4), st.integers(1, 5))


@settings(max_examples=examples(120), deadline=None)
@given(st.lists(kinds, max_size=25))
def test_what_was_not_used_for_longest_goes_first_and_last_blocks_before_first_ones(
    asked: list[tuple[int, int]],
) -> None:
    cluster, slow = cluster_of(0, CAPACITY), Slow()
    for number, (kind, blocks) in enumerate(asked, 1):
        assert ask(cluster, number, kind, blocks) == slow.ask(kind, blocks)
        assert cluster.life.ledger.workers["w0"].cached == slow.blocks
    assert len(cluster.life.cache) == len(slow.nodes)


def test_a_beginning_of_the_same_hash_is_not_taken_for_another(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (beginnings, prefix_index, prefix_cache):
        monkeypatch.setattr(module, "chain", lambda tokens, size, _: iter(range(len(tokens) // size)))
    cluster = cluster_of(0, 30)
    for number, kind in enumerate((1, 2, 1, 3), 1):
        ask(cluster, number, kind, 3)
    assert [cluster.reused[number] for number in (1, 2, 4)] == [0, 0, 0]


def test_of_equal_beginnings_the_one_on_the_requests_own_worker_is_shared() -> None:
    for busy in ("w0", "w1"):
        cluster = cluster_of(0, 30, 30)
        prompt = array("i", range(21))
        for number in (1, 2):  # at the same time, on both workers
            cluster.submit(number, prompt, SamplingParams(max_new_tokens=5))
        finish(cluster)
        assert {account.cached for account in cluster.life.ledger.workers.values()} == {6}
        cluster.life.ledger.reserve(99, (Span(busy, 0, 40),), idle=True)
        cluster.life.ledger.commit(99, 40)
        cluster.submit(3, prompt, SamplingParams(max_new_tokens=5))
        placement = cluster.life.ledger.sequences[3].placement
        assert {span.worker for span in placement} == {"w0", "w1"} - {busy}
        assert cluster.life.requests[3].reuse.shared == 20


def test_nothing_is_shared_behind_a_beginning_that_lost_blocks() -> None:
    cluster = cluster_of(1, 8, 12)
    whole = array("i", range(61))
    cluster.submit(1, whole, SamplingParams(max_new_tokens=2))
    first, second = (span.worker for span in cluster.life.ledger.sequences[1].placement)
    finish(cluster)
    branch = whole[:8] + array("i", [7] * 9)
    cluster.submit(2, branch, SamplingParams(max_new_tokens=2))
    finish(cluster)
    assert cluster.reused[2] == 8, "it is cached behind the first one"
    cluster.submit(3, whole[:60] + array("i", [9]), SamplingParams(max_new_tokens=9))
    assert cluster.life.requests[3].reuse.shared == 60
    cluster.lose_worker(second)
    cluster.submit(4, branch, SamplingParams(max_new_tokens=2))
    assert cluster.life.requests[4].reuse.shared == 0
    cluster.add_worker(20)
    settle(cluster)
    assert first in cluster.pools
    assert [cluster.tokens[number] for number in (3, 4)] == [expected(3, 9), expected(4, 2)]
    assert_nothing_left(cluster)
