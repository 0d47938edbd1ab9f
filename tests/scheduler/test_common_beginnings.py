"""Requests that begin alike and run at the same time compute their common beginning once, whatever happens to one."""

from __future__ import annotations

import random
from array import array

import pytest
from _examples import examples
from _simulated import BLOCK, Simulated, assert_nothing_left, cluster_of, expected, finish, mishaps, settle
from hypothesis import given, settings
from hypothesis import strategies as st

from distkv_dask.gang import PrefillChunk
from distkv_dask.messages import to_worker as to
from distkv_dask.messages.client_calls import Generate
from distkv_dask.messages.names import COMMON_NUMBERS
from distkv_dask.sampling import SamplingParams
from distkv_dask.scheduler.records.states import Decode, Prefill, Waiting

COMMON = 60


def text(seed: int, tokens: int) -> array[int]:
    return array("i", (random.Random(seed).randrange(10**6) for _ in range(tokens)))


class Counting(Simulated):
    """Counts the prompt tokens that are computed."""

    computed = 0

    def run_chunk(self, chunk: PrefillChunk) -> None:
        self.computed += len(chunk.tokens)
        super().run_chunk(chunk)


def counting(*capacities: int, **config: object) -> Counting:
    cluster = cluster_of(0, *capacities, **config)
    cluster.__class__ = Counting
    assert isinstance(cluster, Counting)
    return cluster


def submission(number: int, prompt: array[int], new: int = 5, priority: int = 0) -> Generate:
    return Generate(number, prompt, SamplingParams(max_new_tokens=new, priority=priority))


def together(cluster: Simulated, count: int, common: int = COMMON, new: int = 5) -> None:
    """Submit requests at the same time, each with 3 tokens of its own after the common ones."""
    cluster.send(*(submission(number, text(0, common) + text(number, 3), new) for number in range(1, count + 1)))


def assert_answered(cluster: Simulated, *numbers: int, new: int = 5) -> None:
    for number in numbers:
        assert cluster.tokens[number] == expected(number, new)


def step_until(cluster: Simulated, state: type, number: int = 1) -> None:
    while not isinstance(cluster.life.requests[number].state, state):
        assert cluster.step()


@pytest.mark.parametrize("count", [2, 4])
def test_what_requests_of_one_batch_begin_with_is_computed_once(count: int) -> None:
    cluster = counting(200)
    together(cluster, count)
    finish(cluster)
    assert cluster.computed == COMMON + 3 * count
    assert_answered(cluster, *range(1, count + 1))
    assert [cluster.reused[number] for number in range(1, count + 1)] == [0] + [COMMON] * (count - 1)
    assert_nothing_left(cluster)


def test_a_request_that_comes_while_the_first_is_computed_waits_for_it_and_not_for_its_answer() -> None:
    cluster = counting(200)
    together(cluster, 1, new=20)
    cluster.step()
    cluster.send(submission(2, text(0, COMMON) + text(2, 3)))
    assert isinstance(cluster.life.requests[2].state, Waiting)
    finish(cluster)
    assert cluster.computed == COMMON + 6
    assert cluster.ends[2][0] == "length"
    assert [*cluster.ends] == [2, 1], "it was done before the first one was"
    assert_nothing_left(cluster)


def test_a_request_that_comes_while_the_first_decodes_shares_its_prompt() -> None:
    cluster = counting(200)
    together(cluster, 1, new=20)
    step_until(cluster, Decode)
    cluster.send(submission(2, text(0, COMMON) + text(2, 3)))
    assert isinstance(cluster.life.requests[2].state, Prefill)
    (shared,) = {span.document for span in cluster.life.ledger.sequences[2].placement} - {None}
    assert shared >= COMMON_NUMBERS
    assert cluster.life.ledger.sequences[1].documents == {shared}
    assert [one.placement for one in cluster.seen if isinstance(one, to.Relocate)] == [
        cluster.life.ledger.sequences[1].placement
    ], "both read it under the same number, so once in a step"
    finish(cluster)
    assert_answered(cluster, 2)
    assert cluster.tokens[1] == expected(1, 20)
    assert_nothing_left(cluster)


def test_a_beginning_stays_as_long_as_anybody_shares_it_and_is_cached_then() -> None:
    cluster = counting(200)
    together(cluster, 1, new=2)
    step_until(cluster, Decode)
    cluster.send(submission(2, text(0, COMMON) + text(2, 3), new=20))
    while 1 in cluster.life.requests:
        cluster.step()
    assert cluster.life.ledger.workers["w0"].used >= COMMON // BLOCK
    finish(cluster)
    before = cluster.computed
    cluster.send(submission(3, text(0, COMMON) + text(3, 3)))
    finish(cluster)
    assert cluster.computed - before == 3
    assert_nothing_left(cluster)


def test_requests_that_share_more_and_more_build_on_each_other() -> None:
    cluster = counting(200)
    first = text(0, 40) + text(1, 40) + text(2, 40)
    cluster.send(submission(1, first, new=20))
    step_until(cluster, Decode)
    for number, common in ((2, 40), (3, 80), (4, 112), (5, 80)):
        cluster.send(submission(number, first[:common] + text(number + 10, 3), new=20))
    finish(cluster)
    assert cluster.computed == 120 + 4 * 3
    for number in range(1, 6):
        assert cluster.tokens[number] == expected(number, 20)
    assert_nothing_left(cluster)


@pytest.mark.parametrize("steps", [0, 3, 9, 14])
def test_the_others_go_on_if_the_first_is_cancelled(steps: int) -> None:
    cluster = counting(200)
    together(cluster, 4)
    for _ in range(steps):
        cluster.step()
    cluster.stop(1)
    finish(cluster)
    assert_answered(cluster, 2, 3, 4)
    assert cluster.computed < 2 * COMMON + 4 * 3
    assert_nothing_left(cluster)


@pytest.mark.parametrize("steps", range(0, 24, 3))
def test_all_are_answered_if_the_worker_of_the_first_dies(steps: int) -> None:
    cluster = counting(60, 60)
    together(cluster, 4)
    for _ in range(steps):
        cluster.step()
    cluster.lose_worker(cluster.life.ledger.sequences[1].home if 1 in cluster.life.ledger.sequences else "w0")
    settle(cluster)
    assert_answered(cluster, 1, 2, 3, 4)
    assert_nothing_left(cluster)


def test_all_are_answered_if_the_first_makes_way_for_another() -> None:
    cluster = counting(40)
    together(cluster, 1, new=40)
    step_until(cluster, Decode)
    cluster.send(submission(2, text(0, COMMON) + text(2, 3), new=40))
    while cluster.chunks:
        cluster.run_chunk(cluster.chunks[0][0])
    cluster.send(submission(3, text(9, 70), new=4, priority=1))
    settle(cluster)
    assert_answered(cluster, 1, 2, new=40)
    assert cluster.tokens[3] == expected(3, 4)
    assert next(iter(cluster.ends)) == 3
    assert_nothing_left(cluster)


def test_each_worker_that_does_nothing_else_computes_the_beginning_itself() -> None:
    cluster = counting(200, 200)
    together(cluster, 6)
    finish(cluster)
    assert cluster.computed == 2 * COMMON + 6 * 3
    assert_answered(cluster, *range(1, 7))


def test_a_long_beginning_is_waited_for_where_the_other_worker_has_enough_to_do() -> None:
    cluster = counting(500, 500)
    together(cluster, 1, common=400, new=2)
    cluster.send(submission(9, text(9, 800), new=2))
    assert {cluster.life.ledger.sequences[number].home for number in (1, 9)} == {"w0", "w1"}
    cluster.send(submission(2, text(0, 400) + text(2, 3), new=2))
    finish(cluster)
    assert cluster.computed == 400 + 3 + 800 + 3
    assert_answered(cluster, 1, 2, new=2)


def test_nobody_waits_for_so_few_tokens_that_another_forward_takes_longer() -> None:
    cluster = counting(200, prefill_chunk_tokens=64)
    together(cluster, 2, common=2 * BLOCK)
    assert all(isinstance(one.state, Prefill) for one in cluster.life.requests.values())
    many = counting(200, prefill_chunk_tokens=64)
    together(many, 8, common=2 * BLOCK)
    finish(many)
    assert many.computed == 2 * BLOCK + 8 * 3, "but for so many it pays"


@pytest.mark.timeout(20)  # the scheduler would never return
def test_nobody_waits_for_a_prompt_that_is_not_computed_now() -> None:
    cluster = counting(200)
    together(cluster, 1, new=20)
    cluster.life.in_prefill.clear()
    cluster.send(submission(2, text(0, COMMON) + text(2, 3)))
    assert isinstance(cluster.life.requests[2].state, Prefill)


@pytest.mark.parametrize("config", [{"prefix_cache": False}, {"deterministic": True}])
def test_nothing_is_shared_where_sharing_is_off_or_would_change_bits(config: dict[str, bool]) -> None:
    cluster = counting(200, **config)
    together(cluster, 4, new=2)
    finish(cluster)
    assert cluster.computed >= 2 * (COMMON + 3)
    assert not any(isinstance(one, to.Share) for one in cluster.seen)


batches = st.lists(
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 60), st.integers(0, 9), st.integers(1, 22)), max_size=5),
    min_size=1,
    max_size=6,
)
"""Requests by arrival: whose text they begin with, how many tokens of it, and how many of their own."""


@settings(max_examples=examples(120), deadline=None)
@given(st.integers(0, 2**32), st.lists(st.integers(23, 60), min_size=1, max_size=3), batches, mishaps, st.booleans())
def test_whatever_happens_all_are_answered_rightly_and_nothing_is_left(
    seed: int, sizes: list[int], batches: list[list[tuple[int, int, int, int]]], mishaps: list[str], spread: bool
) -> None:
    cluster = cluster_of(seed, *sizes, prefill_workers=2 if spread else 1, prefix_cache_tier="disk")
    wanted: dict[int, int] = {}
    events: list[object] = [*batches, *mishaps]
    cluster.rng.shuffle(events)
    for event in events:
        if isinstance(event, str):
            if event == "cancel" and wanted:
                cluster.stop(cluster.rng.choice(sorted(wanted)))
            else:
                cluster.happen(event)
            continue
        some: list[Generate] = []
        for kind, common, own, new in event:  # type: ignore[attr-defined]
            number = len(wanted) + 1
            wanted[number] = new
            some.append(submission(number, text(kind, common) + text(100 + number, own + 1), new))
        cluster.refusals.clear()
        cluster.send(*some)
    for worker in list(cluster.pools):
        cluster.drain(worker, False)
    settle(cluster)
    for number, new in wanted.items():
        right = expected(number, new)
        assert cluster.tokens[number] == right[: len(cluster.tokens[number])]
        if cluster.ends[number][0] in ("stop", "length"):
            assert cluster.tokens[number] == right
    assert_nothing_left(cluster)
