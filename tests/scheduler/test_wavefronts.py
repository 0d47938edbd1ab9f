"""Chunks of prompts on several workers at once: which begin when, what is recorded, and that none waits forever."""

from __future__ import annotations

import itertools
import random
from array import array
from collections import Counter, defaultdict, deque
from dataclasses import replace
from itertools import pairwise

import pytest
from _examples import examples
from _simulated import BLOCK, Simulated, assert_nothing_left, cluster_of, expected, finish, mishaps, settle
from hypothesis import given, settings
from hypothesis import strategies as st

from distkv_dask.config import Config
from distkv_dask.errors import GangAbortedError
from distkv_dask.gang import DecodeWindow, Earlier, PrefillChunk
from distkv_dask.messages import from_worker as did
from distkv_dask.messages.client_calls import Generate
from distkv_dask.placement import Endpoint, Placement, Span
from distkv_dask.sampling import SamplingParams
from distkv_dask.scheduler.commands import SubmitPrefill
from distkv_dask.scheduler.costs.pieces import equal_pieces, seconds_of_pieces
from distkv_dask.scheduler.costs.presets import PRESET
from distkv_dask.scheduler.ledger.ledger import Ledger
from distkv_dask.scheduler.lifecycle.machine import Lifecycle
from distkv_dask.scheduler.policies.base import Ask
from distkv_dask.scheduler.policies.overflow import Overflow
from distkv_dask.scheduler.records.machine_state import MachineState
from distkv_dask.scheduler.records.states import Prefill, Waiting
from distkv_dask.scheduler.work import replan


class Scattered(Overflow):
    """Places prompts on random workers, with several spans on each."""

    def place(self, ledger: Ledger, ask: Ask, ahead: Ask | None = None) -> Placement | None:
        rng = random.Random(ask.sequence)
        free = {account.worker: account.lendable for account in ledger.workers.values()}
        need, spans, start = ledger.blocks(ask.tokens), list[Span](), 0
        while need:
            roomy = sorted(worker for worker, room in free.items() if room)
            if not roomy:
                return None
            worker = rng.choice(roomy)
            count = min(rng.randint(1, 3), free[worker], need)
            free[worker] -= count
            need -= count
            stop = ask.tokens if not need else start + count * BLOCK
            spans.append(Span(worker, start, stop))
            start = stop
        return tuple(spans)


class InLanes(Simulated):
    """Home lanes compute one chunk at a time, which ends after those that it follows.

    The next chunk of a lane, and the order of messages, are random.
    """

    def __init__(self, machine: Lifecycle, rng: random.Random) -> None:
        super().__init__(machine, rng)
        self.running: dict[str, PrefillChunk] = {}
        self.news: dict[str, deque[did.FromWorker]] = defaultdict(deque)
        self.most = 0

    def choices(self) -> list[object]:
        heads = [chain[0] for chain in self.chunks]
        self.running = {home: one for home, one in self.running.items() if any(one is head for head in heads)}
        self.most = max(self.most, len(self.running))
        for worker in self.news.keys() - self.pools.keys():
            del self.news[worker]
        chunks = [one for one in heads if self.may_go_on(one)]
        assert chunks or not heads, f"all wait for each other: {self.running}"
        tell = [worker for worker, told in self.news.items() if told]
        quiet = self.pools.keys() - self.running.keys() - {*tell}
        windows = [queue[0] for home, queue in self.windows.items() if queue and home in quiet]
        retirements = [one for one in self.retirements if one[0] in quiet]
        return [*chunks, *tell, *windows, *retirements, *self.moves, *self.files]

    def may_go_on(self, chunk: PrefillChunk) -> bool:
        """Whether a chunk may begin, or end."""
        running = self.running.get(chunk.gang.home)
        return running is None or (running is chunk and not self.waits(chunk))

    def take(self, choice: object) -> None:
        match choice:
            case PrefillChunk(gang) if gang.home in self.running:
                self.news[gang.home].append(self.compute(choice))
                del self.running[gang.home]
            case PrefillChunk(gang):
                self.running[gang.home] = choice
                self.news[gang.home].append(did.ChunkStarted(gang.home, gang.number))
            case str():
                self.handle(self.news[choice].popleft())
            case DecodeWindow():
                self.run_window(choice)
            case _:
                super().take(choice)


def in_lanes(seed: int, *capacities: int, workers: int | str = 64) -> InLanes:
    """Such a cluster with scattered prompts."""
    config = Config.load(
        block_tokens=BLOCK, prefill_chunk_tokens=8, window_batch=4, spill=1500, prefill_workers=workers
    )
    cluster = InLanes(
        Lifecycle(MachineState("engine", config, itertools.count(1), block_bytes=100)), random.Random(seed)
    )
    cluster.life.queue.policy = Scattered(cluster.life.policy.model)
    for capacity in capacities:
        cluster.add_worker(capacity)
    return cluster


prompts = st.lists(st.integers(1, 60), min_size=1, max_size=6)


@settings(max_examples=examples(100), deadline=None)
@given(
    st.integers(0, 2**32),
    st.lists(st.integers(20, 40), min_size=2, max_size=4),
    prompts,
    mishaps,
    st.sampled_from([64, "auto"]),
    st.booleans(),
)
def test_prompts_on_the_same_workers_never_wait_for_each_other_whatever_the_lanes_begin_with(
    seed: int, sizes: list[int], lengths: list[int], events: list[str], workers: int | str, scattered: bool
) -> None:
    cluster = in_lanes(seed, *sizes, workers=workers)
    if not scattered:
        cluster.life.queue.policy = Overflow(cluster.life.policy.model)
    for number, length in enumerate(lengths):
        alike = number * (not scattered) * 1000
        cluster.submit(number, array("i", range(alike, alike + length)), SamplingParams(max_new_tokens=5))
    for event in events:
        if event == "cancel" and cluster.life.requests:
            cluster.stop(cluster.rng.choice(sorted(cluster.life.requests)))
        else:
            cluster.happen(event)
    for worker in list(cluster.pools):
        cluster.drain(worker, False)
    settle(cluster)
    assert set(cluster.ends) == set(range(len(lengths)))
    for number, (reason, _) in cluster.ends.items():
        right = expected(number, 5)
        assert cluster.tokens[number] == (right if reason == "length" else right[: len(cluster.tokens[number])])
    assert_nothing_left(cluster)


def test_many_workers_compute_one_prompt_at_once() -> None:
    cluster = in_lanes(3, 40, 40, 40)
    cluster.submit(0, array("i", range(100)), SamplingParams(max_new_tokens=3))
    finish(cluster)
    assert cluster.ends == {0: ("length", None)}
    assert cluster.most == 3


def test_news_of_later_chunks_that_come_first_are_recorded_when_those_before_are() -> None:
    cluster = in_lanes(1, 40, 40)
    cluster.submit(0, array("i", range(12)), SamplingParams(max_new_tokens=3))
    state = cluster.life.requests[0].state
    assert isinstance(state, Prefill)
    first, second = list(state.chunks.values())[:2]
    assert first.gang.home != second.gang.home
    cluster.handle(did.ChunkStarted(first.gang.home, first.gang.number))
    second = state.chunks[second.gang.number]
    assert second.gang.follows == (Earlier(first.gang.number, first.gang.home),)
    events = [cluster.compute(first), cluster.compute(second)]
    cluster.handle(events[1])
    assert cluster.life.ledger.sequences[0].length == 0
    assert not cluster.tokens[0]
    cluster.handle(events[0])
    assert cluster.life.ledger.sequences[0].length == second.stop
    finish(cluster)
    assert cluster.tokens[0] == expected(0, 3)


def test_a_prompt_of_which_a_chunk_failed_is_computed_by_one_after_the_other() -> None:
    cluster = in_lanes(1, 40, 40)
    cluster.submit(0, array("i", range(40)), SamplingParams(max_new_tokens=3))
    state = cluster.life.requests[0].state
    first = next(iter(state.chunks.values()))
    commands = cluster.watch()
    cluster.handle(did.GangFailed(first.gang.home, first.gang.number, GangAbortedError("a peer was silent")))
    (graph,) = (one for one in commands if isinstance(one, SubmitPrefill))
    assert sum(len(chunk.tokens) for chunk in graph.chunks) == 40
    finish(cluster)
    assert cluster.ends == {0: ("length", None)}


# Which worker computes what


def spread_over(cluster: Simulated, number: int) -> int:
    return len({span.worker for span in cluster.life.ledger.sequences[number].placement})


def of_workers(workers: int | str, *capacities: int) -> Simulated:
    return cluster_of(1, *capacities, prefill_workers=workers)


LONG = array("i", range(400))


@pytest.fixture(autouse=True)
def always_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """Count short prompts as long, and the cluster as quiet at once."""
    monkeypatch.setattr(replan, "LONG", 0.0)
    monkeypatch.setattr(replan, "QUIET", 0.0)


@pytest.mark.parametrize(("workers", "spread"), [("auto", 3), (1, 1), (2, 2), (8, 3)])
def test_a_long_prompt_is_computed_by_as_many_workers_as_may(workers: int | str, spread: int) -> None:
    cluster = of_workers(workers, 200, 200, 200)
    cluster.submit(0, LONG, SamplingParams(max_new_tokens=2))
    assert spread_over(cluster, 0) == spread
    finish(cluster)
    assert cluster.ends == {0: ("length", None)}
    assert cluster.tokens[0] == expected(0, 2)


def test_where_others_wait_or_work_a_prompt_stays_with_one_worker() -> None:
    cluster = of_workers("auto", 200, 200)
    both = [Generate(number, LONG, SamplingParams(max_new_tokens=2)) for number in range(3)]
    cluster.send(*both)
    assert [spread_over(cluster, number) for number in cluster.life.ledger.sequences] == [1, 1]
    finish(cluster)
    assert len(cluster.ends) == 3


def test_short_prompts_documents_and_those_without_room_elsewhere_stay_with_one_worker() -> None:
    cluster = of_workers("auto", 200, 200)
    cluster.submit(0, array("i", range(8)), SamplingParams(max_new_tokens=2))
    assert spread_over(cluster, 0) == 1
    finish(cluster)
    cluster.ingest(1, LONG)
    other = of_workers(1, 200, 200)
    other.ingest(1, LONG)
    assert len(cluster.life.ledger.sequences[1].placement) == len(other.life.ledger.sequences[1].placement)
    cluster = of_workers("auto", 200, 20)
    cluster.submit(0, LONG, SamplingParams(max_new_tokens=2))
    assert spread_over(cluster, 0) == 1


def long_prompt(number: int) -> Generate:
    return Generate(number, array("i", range(1000 * number, 1000 * number + 400)), SamplingParams(max_new_tokens=2))


def computing(cluster: Simulated, number: int) -> set[str]:
    """Workers that compute the rest of a prompt."""
    state = cluster.life.requests[number].state
    assert isinstance(state, Prefill)
    return {chunk.gang.home for chunk in state.chunks.values() if chunk.gang.number not in state.under_way}


def test_nobody_helps_before_the_cluster_has_been_quiet_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replan, "QUIET", 2.5)  # in chunks, which take 15 ms each by the model; an event takes 10 ms
    cluster = of_workers("auto", 200, 200)
    cluster.send(long_prompt(1))
    (home,) = computing(cluster, 1)
    while computing(cluster, 1) == {home}:
        assert cluster.step()
    assert 0.03 < cluster.now < 0.1
    finish(cluster)
    assert cluster.tokens[1] == expected(1, 2)
    assert_nothing_left(cluster)


def test_a_worker_that_gets_work_of_its_own_helps_no_more_and_one_that_has_none_any_more_helps_again() -> None:
    cluster = of_workers("auto", 200, 200)
    cluster.send(long_prompt(1))
    assert computing(cluster, 1) == {"w0", "w1"}
    home = cluster.life.ledger.sequences[1].home
    cluster.send(long_prompt(2))
    assert cluster.life.ledger.sequences[2].home != home
    for _ in range(4):
        cluster.step()
    assert computing(cluster, 1) == {home}
    cluster.stop(2)
    for _ in range(8):
        cluster.step()
    assert computing(cluster, 1) == {"w0", "w1"}
    finish(cluster)
    assert cluster.tokens[1] == expected(1, 2)
    assert_nothing_left(cluster)


def test_a_prompt_goes_back_to_its_home_while_another_request_waits() -> None:
    cluster = of_workers("auto", 220, 220)
    cluster.send(long_prompt(1))
    assert computing(cluster, 1) == {"w0", "w1"}
    cluster.send(Generate(2, array("i", range(1600)), SamplingParams(max_new_tokens=2)))
    assert isinstance(cluster.life.requests[2].state, Waiting)
    for _ in range(4):
        cluster.step()
    assert len(computing(cluster, 1)) == 1
    finish(cluster)
    assert cluster.tokens[1] == expected(1, 2)
    assert cluster.tokens[2] == expected(2, 2)
    assert_nothing_left(cluster)


def test_a_worker_has_one_chunk_of_a_prompt_at_a_time_so_that_others_wait_for_one_at_most() -> None:
    cluster = in_lanes(1, 200, 200, 200, workers="auto")
    cluster.life.queue.policy = Overflow(cluster.life.policy.model)
    cluster.send(long_prompt(1))
    while 1 in cluster.life.requests:
        under_way = Counter(chunk.gang.home for chain in cluster.chunks for chunk in chain)
        assert max(under_way.values(), default=0) <= 1
        cluster.step()
    assert cluster.most == 3


def test_short_chunks_are_submitted_all_at_once_to_one_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replan, "LONG", 0.3)
    cluster = of_workers("auto", 200, 200)
    cluster.send(long_prompt(1))
    assert spread_over(cluster, 1) == 1
    assert sum(len(chunk.tokens) for chain in cluster.chunks for chunk in chain) == 400


@given(st.integers(1, 20_000), st.integers(1, 8), st.sampled_from([64, 512, 2048]))
def test_pieces_are_all_of_a_prompt_in_turns_and_no_longer_than_a_chunk(tokens: int, count: int, step: int) -> None:
    workers = [f"w{at}" for at in range(count)]
    pieces = equal_pieces(PRESET, workers, tokens, step, 64)
    assert pieces[0][1] == 0
    assert pieces[-1][2] == tokens
    assert all(one[2] == other[1] and other[1] % 64 == 0 for one, other in pairwise(pieces))
    assert all(0 < last - first < step + 64 for _, first, last in pieces)
    assert pieces[-1][0] == workers[-1]


@pytest.mark.parametrize("workers", [2, 3, 4])
def test_pieces_end_together(workers: int) -> None:
    names = [f"w{at}" for at in range(workers)]
    ends = {name: Endpoint(name, "host", 1) for name in names}
    seconds = seconds_of_pieces(PRESET, equal_pieces(PRESET, names, 6000, 512, 64), ends)
    assert seconds < 1.15 * PRESET.curve.prefill(6000) / workers


def test_a_slow_worker_gets_less() -> None:
    slow = replace(PRESET.curve, prompt=2 * PRESET.curve.prompt, pair=2 * PRESET.curve.pair)
    pieces = equal_pieces(replace(PRESET, curves={"b": slow}), ["b", "a"], 6000, 512, 16)
    tokens = Counter[str]()
    for worker, first, last in pieces:
        tokens[worker] += last - first
    assert tokens["b"] == pytest.approx(2000, rel=0.1)
