"""An engine's figures and status: every number is the sum of its events, and the status shows the current state."""

from __future__ import annotations

from collections import Counter

import pytest
from _simulated import Simulated, cluster_of, finish
from _situations import SITUATIONS
from hypothesis import given
from hypothesis import strategies as st
from test_document_life import ask, prompt, stored

from distkv_dask.completion import Timings
from distkv_dask.gang import Exchanged, WindowResult
from distkv_dask.messages.status import EngineStatus
from distkv_dask.sampling import SamplingParams
from distkv_dask.scheduler.engines.figures import EVENTS, HISTORY, RECENT, Figures, Latency
from distkv_dask.scheduler.engines.status import status_of

parts = st.integers(0, 1000)
exchanges = st.builds(Exchanged, parts.map(float), parts.map(float), parts, parts)
windows = st.builds(
    WindowResult, st.just({}), st.just({}), st.integers(0, 9), parts.map(float), exchanges, parts.map(float)
)


@given(st.lists(st.tuples(st.sampled_from("ab"), windows), max_size=12))
def test_windows_are_added_up_for_the_engine_and_for_each_home(done: list[tuple[str, WindowResult]]) -> None:
    figures = Figures()
    for home, result in done:
        figures.window(home, result)
    ran = [(home, result) for home, result in done if result.steps]
    totals = figures.totals
    assert totals["windows"] == len(ran)
    assert totals["decode_steps"] == sum(result.steps for _, result in ran)
    assert totals["decode_seconds"] == sum(result.seconds for _, result in ran)
    assert totals["gap_seconds"] == sum(result.gap for _, result in ran)
    assert totals["sending_seconds"] == sum(result.exchanged.sending for _, result in ran)
    assert totals["waiting_seconds"] == sum(result.exchanged.waiting for _, result in ran)
    assert totals["bytes_to_holders"] == sum(result.exchanged.sent_bytes for _, result in done)
    assert totals["bytes_to_homes"] == sum(result.exchanged.received_bytes for _, result in done)
    for name in {home for home, _ in ran}:
        one, its = figures.anatomy[name], [result for home, result in ran if home == name]
        assert one.steps == sum(result.steps for result in its)
        assert one.seconds == sum(result.seconds for result in its)
        assert one.gap == sum(result.gap for result in its)
        assert one.sending == sum(result.exchanged.sending for result in its)
        assert one.waiting == sum(result.exchanged.waiting for result in its)


ends = st.tuples(
    st.sampled_from(["stop", "length", "error", "cancelled"]),
    st.builds(Timings, parts.map(float), parts.map(float), parts.map(float)),
    st.integers(0, 20),
)


@given(st.lists(ends, max_size=20), st.integers(0, 20))
def test_an_engine_that_was_closed_counts_on_as_if_all_had_been_one(done: list, cut: int) -> None:
    whole, first, second = Figures(), Figures(), Figures()
    for at, (reason, timings, generated) in enumerate(done):
        for figures in (whole, first if at < cut else second):
            figures.ended(reason, timings, generated)
            figures.generated(generated)
            figures.happened(1.0, "move", "text")
    first.absorb(second)
    assert first.totals == whole.totals
    assert first.finished == whole.finished == Counter(reason for reason, _, _ in done)
    answered = [(timings, generated) for reason, timings, generated in done if reason in ("stop", "length")]
    for mine, its in (
        (first.queue, whole.queue),
        (first.first_token, whole.first_token),
        (first.per_token, whole.per_token),
    ):
        assert mine.counts == its.counts
        assert mine.sum == pytest.approx(its.sum)
    assert whole.queue.sum == sum(timings.queued for timings, _ in answered)
    assert whole.first_token.sum == sum(timings.queued + timings.prefill for timings, _ in answered)
    steps = [timings.decode / (generated - 1) for timings, generated in answered if generated > 1]
    assert whole.per_token.sum == pytest.approx(sum(steps))


@given(st.lists(st.floats(0, 100), min_size=1, max_size=60))
def test_a_percentile_is_the_smallest_time_that_so_many_did_not_exceed(seconds: list[float]) -> None:
    latency = Latency((1.0,))
    for one in seconds:
        latency.observe(one)
    for name, found in latency.percentiles().items():
        part = int(name[1:])
        enough = [one for one in seconds if sum(other <= one for other in seconds) * 100 >= part * len(seconds)]
        assert found == min(enough)


def test_only_so_much_of_the_past_is_kept() -> None:
    figures, latency = Figures(), Latency((1.0,))
    for number in range(2 * max(HISTORY, EVENTS, RECENT)):
        figures.happened(number, "move", "text")
        figures.sample(number, Counter(waiting=1, decode=2))
        latency.observe(number)
    assert (len(figures.history), len(figures.events), len(latency.recent)) == (HISTORY, EVENTS, RECENT)
    assert figures.totals["move_events"] == 2 * max(HISTORY, EVENTS, RECENT)
    assert latency.percentiles()["p50"] > RECENT, "of the recent ones"
    last = figures.history[-1]
    assert (last.waiting, last.prefill, last.decode) == (1, 0, 2)


# Status


def status(cluster: Simulated) -> EngineStatus:
    return status_of(cluster.life, Figures(), {})


def test_a_status_says_why_an_engine_does_not_speculate_although_it_should() -> None:
    cluster = cluster_of(0, 10, speculation="auto")
    assert status(cluster).speculation == "auto"
    cluster.life.keep_states(100)
    assert status(cluster).speculation == "off: recurrent state and windows cannot be rolled back"
    assert status(cluster_of(0, 10, speculation="off")).speculation == "off"


@pytest.mark.parametrize("situation", SITUATIONS)
def test_a_status_adds_up_in_every_situation(situation: str) -> None:
    cluster = SITUATIONS[situation][1]()
    ledger, seen = cluster.life.ledger, status(cluster)
    assert seen.workers.keys() == cluster.pools.keys()
    for worker, one in seen.workers.items():
        blocks = one.blocks
        assert blocks.own + blocks.lent + blocks.documents + blocks.cached + blocks.free == one.capacity_blocks
        assert blocks.own + blocks.lent + blocks.documents == one.used_blocks == ledger.workers[worker].used
        assert min(blocks.own, blocks.lent, blocks.documents, blocks.cached, blocks.free) >= 0
        assert one.lent_blocks == sum(debt.blocks for debt in seen.debts if debt.creditor == worker)
        at_home = [number for number, entry in seen.sequences.items() if entry.home == worker]
        requests = [cluster.life.requests[number] for number in at_home]
        assert one.sequences == sum(not request.is_document and not request.is_save for request in requests)
    for number, entry in seen.sequences.items():
        held = sum(span.tokens for span in entry.placement)
        assert entry.kv_tokens <= held
        assert (entry.home is None) == (not entry.placement)
        assert entry.home is None or entry.home == entry.placement[-1].worker
        assert number in cluster.life.requests


def test_what_is_cached_is_nobodys_sequence_also_while_somebody_shares_it() -> None:
    cluster = cluster_of(0, 30)
    for number in (1, 2):
        cluster.submit(number, prompt(0, 21), SamplingParams(max_new_tokens=5))
        while number == 1 and cluster.step():
            pass
    assert cluster.reused == {1: 0} or 2 not in cluster.reused
    assert any(one.is_cached for one in cluster.life.requests.values())
    assert [*status(cluster).sequences] == [2]
    finish(cluster)
    assert not status(cluster).sequences
    assert status(cluster).workers["w0"].blocks.cached > 0


def test_questions_of_a_document_do_not_count_documents_that_build_on_it() -> None:
    cluster = stored([40])
    ask(cluster, 1, keeps=True)
    finish(cluster)
    assert cluster.life.requests[1].is_document
    ask(cluster, 2)
    seen = status(cluster).sequences
    assert [seen[number].document for number in (0, 1, 2)] == [True, True, False]
    assert [seen[number].questions for number in (0, 1, 2)] == [1, 0, 0]
    assert {*cluster.life.demand(0).dependents} == {1, 2}
