"""Windows and chunks: when the next one is sent, its length, its sequences, and how a prompt is cut."""

from __future__ import annotations

from array import array

import pytest
from _simulated import Simulated, cluster_of, expected, finish
from hypothesis import given
from hypothesis import strategies as st
from test_document_life import ask, stored

from distkv_dask.gang import DecodeWindow, Gang, WindowResult
from distkv_dask.messages import from_worker as did
from distkv_dask.messages import to_worker as to
from distkv_dask.messages.client_calls import Generate
from distkv_dask.placement import Endpoint, Placement, Span
from distkv_dask.sampling import SamplingParams
from distkv_dask.scheduler import commands as do
from distkv_dask.scheduler.costs.pacer import STRANGERS, Pacer
from distkv_dask.scheduler.records.request import Asked, Request
from distkv_dask.scheduler.records.window_chain import PATIENCE, SURE, Outstanding, WindowChain
from distkv_dask.scheduler.work.chunks import cut_prompt
from distkv_dask.scheduler.work.prefill import FORWARDS, Room, room

HOLDER = Endpoint("holder", "host", 1)
CHUNK = 8
"""Tokens of a chunk in :func:`_simulated.cluster_of`."""


def window(number: int, seconds: float = 1.0, steps: int | None = None) -> DecodeWindow:
    return DecodeWindow(Gang("engine", number, f"w{number}", 0, "home", (HOLDER,)), number, steps, seconds)


def request(number: int, remaining: int) -> Request:
    return Request(number, array("i", [1]), Asked(0.0, SamplingParams(max_new_tokens=remaining)))


# When


@pytest.mark.parametrize("remaining", [(5,), (5, 30), (8, 8), (9, 8)])
@pytest.mark.parametrize("steps", [None, 8])
@pytest.mark.parametrize("started", [True, False])
@pytest.mark.parametrize("joined", [True, False])
def test_a_window_is_queued_behind_one_that_runs_unless_that_one_ends_all(
    remaining: tuple[int, ...], steps: int | None, started: bool, joined: bool
) -> None:
    chain = WindowChain("home", step_seconds=0.1)
    requests = {number: request(number, tokens) for number, tokens in enumerate(remaining)}
    chain.sequences = {number: () for number in requests}
    batch = frozenset(requests) if joined else frozenset([*requests][1:])
    chain.outstanding[0] = Outstanding(window(0, 1.0 / SURE, steps), started=started, batch=batch)
    expected = 10 if steps is None else 8  # steps of the window
    ends_all = joined and max(remaining) <= expected
    assert chain.needs_window(requests) == (started and not ends_all)
    chain.step_seconds = 0.0  # the time of its steps is not known
    assert chain.needs_window(requests) == started
    chain.rests_until = 5.0
    assert not chain.needs_window(requests)


def test_a_home_has_two_windows_at_most_and_none_without_sequences() -> None:
    chain = WindowChain("home")
    assert not chain.needs_window({})
    assert chain.tasks == 0
    chain.sequences, chain.members = {1: (HOLDER,)}, 2
    assert chain.tasks == 2
    for number in (0, 1):
        assert chain.needs_window({1: request(1, 100)})
        chain.outstanding[number] = Outstanding(window(number), started=True)
    assert not chain.needs_window({1: request(1, 100)})
    assert [gang.number for gang in chain.gangs()] == [0, 1]
    assert {*chain.holders()} == {HOLDER}


def test_a_window_is_expected_to_end_with_its_steps_or_its_time() -> None:
    chain = WindowChain("home", step_seconds=0.25)
    assert chain.expected(window(0, 3.0)) == 3.0
    assert chain.expected(window(0, 3.0, steps=4)) == 1.0
    assert chain.expected(window(0, 3.0, steps=40)) == 3.0
    assert WindowChain("home").expected(window(0, 3.0, steps=4)) == 0.0


def test_a_window_that_does_not_start_is_late_counted_from_when_that_was_seen() -> None:
    chain = WindowChain("home")
    assert chain.late(0.0, 10.0) is None
    chain.outstanding[0] = Outstanding(window(0))
    assert [chain.late(now, 10.0) for now in (5.0, 15.0)] == [None, None]
    late = chain.late(15.1, 10.0)
    assert late is not None
    assert late.number == 0
    chain.outstanding[0].started = True
    assert chain.late(1000.0, 10.0) is None


# Who


def decoding(**config: float) -> Simulated:
    """A request whose home and a holder decode it."""
    cluster = cluster_of(1, 8, 8, **config)
    cluster.submit(
        1, array("i", range(44)), SamplingParams(max_new_tokens=20), streamed=bool(config.pop("streamed", 0))
    )
    while cluster.life.requests[1].state.label != "decode":
        cluster.step()
    return cluster


@pytest.mark.parametrize("used", [True, False])
def test_a_holder_that_no_sequence_needed_is_told_and_only_such_a_one(used: bool) -> None:
    cluster = decoding()
    (home,) = (home for home, queue in cluster.windows.items() if queue)
    queued = cluster.windows[home].pop(0)
    (holder,) = queued.gang.holders
    commands = cluster.watch()
    result = WindowResult({1: []}, {}, 1, 0.1)
    cluster.handle(did.WindowDone(home, queued.window, 0, result, (holder.worker,) if used else ()))
    aborted = [one for one in commands if isinstance(one, to.Abort)]
    assert [(one.worker, one.gang, one.unused) for one in aborted] == (
        [] if used else [(holder.worker, queued.gang.number, True)]
    )


def test_the_next_window_may_wait_for_a_part_of_the_running_one() -> None:
    cluster = decoding(window_seconds=2.0)
    (home,) = (home for home, queue in cluster.windows.items() if queue)
    running = cluster.windows[home][0]
    commands = cluster.watch()
    cluster.handle(did.WindowStarted(home, running.window))
    (sent,) = (one for one in commands if isinstance(one, do.SubmitWindow))
    assert sent.after == running.gang
    assert sent.patience == pytest.approx(PATIENCE * running.seconds)


@pytest.mark.parametrize(("start", "streams"), [(100.0, 5.0), (6.0, 3.0)])
def test_a_window_that_somebody_watches_is_short_and_all_end_before_holders_give_up(
    start: float, streams: float
) -> None:
    def seconds(streamed: bool) -> float:
        cluster = cluster_of(1, 30, window_stream_seconds=5.0, window_seconds=9.0, timeout_start=start)
        cluster.submit(1, array("i", range(8)), SamplingParams(max_new_tokens=20), streamed=streamed)
        while not cluster.lengths:
            cluster.step()
        return cluster.lengths[0]

    assert seconds(True) == streams
    assert seconds(False) == min(9.0, start / 2)


def test_a_home_whose_lane_a_prompt_needs_ends_its_window_soon_although_nobody_joins_it() -> None:
    cluster = cluster_of(1, 8, 12, window_stream_seconds=0.1, window_seconds=2.0)
    cluster.submit(1, array("i", range(8)), SamplingParams(max_new_tokens=20))
    while cluster.life.requests[1].state.label != "decode":
        cluster.step()
    (first,) = (home for home, batch in cluster.batches.items() if batch)
    assert cluster.lengths == [2.0]
    cluster.submit(2, array("i", range(500, 536)), SamplingParams(max_new_tokens=2))
    account = cluster.life.ledger.sequences[2]
    assert account.home != first
    assert first in {span.worker for span in account.placement}
    while cluster.lengths == [2.0]:
        cluster.run_window(cluster.windows[first][0])
    assert cluster.lengths[1] == 0.1


# Prompts


@st.composite
def placements(draw: st.DrawFn) -> Placement:
    ends = sorted(draw(st.sets(st.integers(1, 60), min_size=1, max_size=5)))
    workers = draw(st.lists(st.sampled_from("abc"), min_size=len(ends), max_size=len(ends)))
    return tuple(Span(*one) for one in zip(workers, [0, *ends], ends, strict=False))


@given(placements(), st.integers(0, 60), st.integers(0, 60), st.integers(1, 20))
def test_a_prompt_is_cut_into_all_of_its_tokens_at_borders_and_never_longer_than_a_chunk(
    placement: Placement, start: int, length: int, step: int
) -> None:
    end = min(start + length, placement[-1].stop)
    pieces = list(cut_prompt(placement, start, end, step))
    assert [at for _, first, last in pieces for at in range(first, last)] == [*range(start, end)]
    owner = {at: span.worker for span in placement for at in range(span.start, span.stop)}
    for worker, first, last in pieces:
        assert last - first <= step
        assert {owner[at] for at in range(first, last)} == {worker}
    borders = {span.start for span in placement}
    fewest = sum(
        -(-(min(span.stop, end) - max(span.start, start)) // step)
        for span in placement
        if min(span.stop, end) > max(span.start, start)
    )
    assert len(pieces) == fewest
    assert borders & {*range(start + 1, end)} <= {first for _, first, _ in pieces}


def test_a_chunk_asks_those_with_tokens_before_its_end_and_nobody_else() -> None:
    cluster = cluster_of(1, 4, 4, 4, 4)
    commands = cluster.watch()
    cluster.submit(1, array("i", range(60)), SamplingParams(max_new_tokens=4))
    (graph,) = (one for one in commands if isinstance(one, do.SubmitPrefill))
    for chunk in graph.chunks:
        stop = chunk.start + len(chunk.tokens)
        needed = {span.worker for span in chunk.placement if span.start < stop} - {chunk.gang.home}
        assert {holder.worker for holder in chunk.gang.holders} == needed
    assert [chunk.sampling is not None for chunk in graph.chunks] == [False] * (len(graph.chunks) - 1) + [True]
    assert len({len(chunk.gang.holders) for chunk in graph.chunks}) == 4


def test_as_many_prompts_are_computed_at_once_as_there_are_workers() -> None:
    cluster = cluster_of(1, 60, 60)
    for number in range(1, 5):
        assert room(cluster.life) == Room(2 - min(number - 1, 2), FORWARDS * 2 * CHUNK)
        cluster.submit(number, array("i", range(100 * number, 100 * number + 30)), SamplingParams(max_new_tokens=2))
    assert [cluster.life.requests[number].state.label for number in range(1, 5)] == ["prefill"] * 2 + ["waiting"] * 2


def test_questions_with_one_chunk_of_their_own_do_not_hold_up_prompts() -> None:
    cluster = stored([60, 60], 20)
    for number in (1, 2, 3):
        ask(cluster, number, tokens=20)
    assert {one.state.label for one in cluster.life.requests.values()} == {"document", "prefill"}
    assert room(cluster.life).long == 2
    cluster.submit(8, array("i", range(900, 930)), SamplingParams(max_new_tokens=2))
    cluster.submit(9, array("i", range(800, 830)), SamplingParams(max_new_tokens=2))
    assert cluster.life.requests[9].state.label == "prefill"
    assert room(cluster.life).long == 0
    finish(cluster)


def test_short_prompts_begin_beside_long_ones_and_as_many_as_a_worker_computes_in_two_forwards() -> None:
    cluster = cluster_of(1, 90, window_batch=16)
    cluster.submit(1, array("i", range(100, 130)), SamplingParams(max_new_tokens=2))
    cluster.submit(2, array("i", range(200, 230)), SamplingParams(max_new_tokens=2))
    for number in range(3, 9):
        cluster.submit(number, array("i", range(100 * number, 100 * number + 5)), SamplingParams(max_new_tokens=2))
    labels = {number: one.state.label for number, one in cluster.life.requests.items()}
    assert labels == {1: "prefill", 2: "waiting"} | {n: "prefill" if n < 3 + 4 else "waiting" for n in range(3, 9)}
    assert room(cluster.life) == Room(0, FORWARDS * CHUNK - 4 * 5)
    finish(cluster)


def test_no_document_makes_way_for_a_prompt_that_waits_for_another_prompt() -> None:
    cluster = stored([60], 20)
    cluster.submit(1, array("i", range(100, 130)), SamplingParams(max_new_tokens=2))
    cluster.submit(2, array("i", range(200, 400)), SamplingParams(max_new_tokens=9))
    assert cluster.life.requests[2].state.label == "waiting"
    assert cluster.life.requests[0].state.label == "document"
    finish(cluster)


# Requests for which a window waits


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("at_once", [True, False])
def test_sequences_of_a_batch_that_nobody_reads_along_wait_for_its_prompts(streamed: bool, at_once: bool) -> None:
    cluster = cluster_of(1, 90)
    prompts = {1: range(100, 108), 2: range(200, 224)}
    sent = [
        Generate(number, array("i", prompt), SamplingParams(max_new_tokens=6), streamed=streamed)
        for number, prompt in prompts.items()
    ]
    for some in [sent] if at_once else [[one] for one in sent]:
        cluster.send(*some)
    cluster.run_chunk(cluster.chunks[0][0])
    waits = at_once and not streamed
    assert bool(cluster.windows["w0"]) != waits
    while cluster.chunks:
        cluster.run_chunk(cluster.chunks[0][0])
    assert len(cluster.windows["w0"]) == 1
    finish(cluster)
    assert cluster.tokens == {number: expected(number, 6) for number in prompts}


@pytest.mark.parametrize("mishap", ["cancelled", "failed", "lost"])
def test_sequences_do_not_wait_for_a_prompt_that_does_not_come(mishap: str) -> None:
    cluster = cluster_of(1, 90, 9)
    prompts = {1: range(100, 108), 2: range(200, 224)}
    cluster.send(*(Generate(n, array("i", one), SamplingParams(max_new_tokens=6)) for n, one in prompts.items()))
    cluster.run_chunk(cluster.chunks[0][0])
    assert not cluster.windows["w0"]
    gang = cluster.chunks[0][0].gang
    match mishap:
        case "cancelled":
            cluster.stop(2)
        case "failed":
            cluster.handle(did.GangFailed("w0", gang.number, ValueError("a fault")))
        case "lost":
            cluster.lose_worker("w0")
    finish(cluster)
    assert cluster.tokens[1] == expected(1, 6)


def test_what_was_begun_is_forgotten_with_its_prompt() -> None:
    cluster = cluster_of(1, 60, 60)
    for number in range(1, 6):
        cluster.submit(number, array("i", range(100 * number, 100 * number + 30)), SamplingParams(max_new_tokens=2))
        finish(cluster)
    cluster.tick()
    assert cluster.life.starts.begun == set()


# The scheduler's budget


def test_what_a_pacer_measured_moves_by_three_tenths() -> None:
    pacer = Pacer()
    pacer.prefilled(4)
    pacer.prefilled(6)
    pacer.measured(2.0, 1.0, tasks=40, others=0)
    assert (pacer.rate, pacer.prefill_rate, pacer.load) == pytest.approx((0.3 * 20, 0.3 * 5, 0.3 * 0.5))
    pacer.measured(2.0, 1.0, tasks=40, others=0)
    assert (pacer.rate, pacer.prefill_rate) == pytest.approx((0.51 * 20, 0.21 * 5)), "chunks are counted once"


@pytest.mark.parametrize("others", [0, 10, 11, 500])
def test_seconds_with_many_tasks_of_others_teach_nothing_of_ours(others: int) -> None:
    pacer = Pacer()
    before = pacer.task_seconds
    pacer.measured(1.0, 0.9, tasks=100, others=others)
    assert (pacer.task_seconds != before) == (others <= STRANGERS * 100)
    assert pacer.idle == 0


@pytest.mark.parametrize(("rounds", "tasks", "others", "learns"), [(0, 0, 0, True), (3, 0, 0, False), (0, 0, 1, False)])
def test_only_seconds_in_which_nothing_is_to_be_done_say_what_an_idle_scheduler_takes(
    rounds: int, tasks: int, others: int, learns: bool
) -> None:
    pacer = Pacer({"engine": rounds})
    pacer.measured(1.0, 0.5, tasks, others)
    assert pacer.idle == (pytest.approx(0.15) if learns else 0)
