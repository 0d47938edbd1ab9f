"""The lifecycle driven by a simulated cluster: every request ends once, with the right tokens, and nothing is left."""

from __future__ import annotations

from array import array

import pytest
from _examples import examples
from _simulated import BLOCK, EOS_EVERY, Simulated, assert_nothing_left, cluster_of, expected, finish, mishaps, settle
from hypothesis import given, settings
from hypothesis import strategies as st

from distkv_dask.errors import CapacityError, GangAbortedError, InvalidRequestError, WorkerLostError
from distkv_dask.gang import WindowResult
from distkv_dask.messages import from_worker as did
from distkv_dask.placement import Move
from distkv_dask.sampling import SamplingParams
from distkv_dask.scheduler.lifecycle import machine
from distkv_dask.scheduler.lifecycle.events import WorkerLost
from distkv_dask.scheduler.lifecycle.losses import MAX_LOSSES

requests = st.lists(st.tuples(st.integers(1, 60), st.integers(1, 40), st.integers(0, 2)), min_size=1, max_size=12)


@settings(max_examples=examples(150), deadline=None)
@given(st.integers(0, 2**32), st.lists(st.integers(8, 20), min_size=1, max_size=4), requests, mishaps)
def test_every_request_ends_once_with_right_tokens_and_nothing_is_left(
    seed: int, sizes: list[int], wanted: list[tuple[int, int, int]], events: list[str]
) -> None:
    cluster, accepted = cluster_of(seed, *sizes), []
    cluster.refusing = True
    life = cluster.life
    for number, (prompt, new, priority) in enumerate(wanted):
        for _ in range(cluster.rng.randint(0, 3)):
            cluster.step()
        try:
            sampling = SamplingParams(max_new_tokens=new, priority=priority)
            cluster.submit(number, array("i", range(prompt)), sampling)
            accepted.append(number)
        except CapacityError:
            pass
    cancelled = set()
    for event in events:
        if event == "cancel" and life.requests:
            number = cluster.rng.choice(sorted(life.requests))
            if number not in cluster.ends:
                cancelled.add(number)
            cluster.stop(number)
        else:
            cluster.happen(event)
    for worker in list(cluster.pools):
        cluster.drain(worker, False)
    settle(cluster)
    assert set(cluster.ends) == set(accepted)
    for number in accepted:
        reason, error = cluster.ends[number]
        right = expected(number, wanted[number][1])
        assert cluster.tokens[number] == right[: len(cluster.tokens[number])], "tokens lost, doubled or out of order"
        if reason in ("stop", "length"):
            assert cluster.tokens[number] == right
            assert reason == ("length" if wanted[number][1] <= EOS_EVERY else "stop")
        assert (reason == "error") == (error is not None)
        assert not isinstance(error, WorkerLostError) or events.count("lose") > MAX_LOSSES
        assert (reason == "cancelled") == (number in cancelled)
        if isinstance(error, InvalidRequestError):
            assert number in cluster.poisoned
            assert str(error) == f"{number} is to blame"
    assert_nothing_left(cluster)


def test_a_burst_larger_than_the_cluster_finishes_in_turn() -> None:
    cluster = cluster_of(1, 10, 10)
    for number in range(20):
        cluster.submit(number, array("i", range(50)), SamplingParams(max_new_tokens=9))
    finish(cluster)
    assert list(cluster.ends) == sorted(cluster.ends)
    assert len(cluster.ends) == 20
    assert all(reason == "length" for reason, _ in cluster.ends.values())


def test_what_can_never_fit_is_refused_with_needed_and_available_bytes_and_the_setting() -> None:
    cluster = cluster_of(1, 10, 10)
    with pytest.raises(CapacityError, match=r"needs 2100 bytes.*have 2000 bytes.*distkv\.kv-memory"):
        cluster.submit(0, array("i", range(80)), SamplingParams(max_new_tokens=2))


def decoding(cluster: Simulated) -> None:
    """Run until every request decodes."""
    while not all(live.state.label == "decode" and len(live.generated) > 1 for live in cluster.life.requests.values()):
        assert cluster.step()


def test_requests_with_blocks_on_a_lost_worker_are_computed_anew_and_go_on_where_they_were() -> None:
    cluster = cluster_of(3, 12, 12)
    for number in range(2):  # one on each worker
        cluster.submit(number, array("i", range(20)), SamplingParams(max_new_tokens=20))
    decoding(cluster)
    told = len(cluster.tokens[0])
    cluster.lose_worker(cluster.life.ledger.sequences[0].home)
    assert cluster.life.requests[0].state.label == "waiting", "the other worker has no room beside its own request"
    finish(cluster)
    assert cluster.tokens == {number: expected(number, 20) for number in range(2)}
    assert cluster.ends == {1: ("length", None), 0: ("length", None)}
    assert 1 < told < 20


@pytest.mark.parametrize("part", [0, -1], ids=["holder", "home"])
def test_a_request_that_loses_its_holder_or_home_waits_for_a_replacement(part: int) -> None:
    cluster = cluster_of(3, 8, 8)
    cluster.submit(0, array("i", range(40)), SamplingParams(max_new_tokens=16))
    decoding(cluster)
    cluster.lose_worker(cluster.life.ledger.sequences[0].placement[part].worker)
    finish(cluster)
    assert not cluster.ends
    cluster.add_worker(8)
    finish(cluster)
    assert cluster.ends == {0: ("length", None)}
    assert cluster.tokens[0] == expected(0, 16)


def test_without_a_replacement_the_request_fails_and_says_which_worker_it_lost() -> None:
    cluster = cluster_of(3, 8, 8)
    cluster.submit(0, array("i", range(40)), SamplingParams(max_new_tokens=16))
    decoding(cluster)
    lost = cluster.life.ledger.sequences[0].home
    cluster.lose_worker(lost)
    finish(cluster)
    cluster.tick()
    cluster.tick(cluster.life.config.timeout_open + 1)
    reason, error = cluster.ends[0]
    assert reason == "error"
    assert isinstance(error, CapacityError)
    assert f"lost blocks with worker {lost}" in str(error)


def test_a_request_that_loses_one_worker_after_the_other_fails_in_the_end() -> None:
    cluster = cluster_of(3, 16)
    cluster.submit(0, array("i", range(20)), SamplingParams(max_new_tokens=22))
    for loss in range(MAX_LOSSES + 1):
        assert 0 not in cluster.ends, f"after {loss} losses"
        cluster.add_worker(16)
        decoding(cluster)
        cluster.lose_worker(cluster.life.ledger.sequences[0].home)
    reason, error = cluster.ends[0]
    assert reason == "error"
    assert isinstance(error, WorkerLostError)
    assert f"{MAX_LOSSES + 1} workers died" in str(error)
    assert cluster.tokens[0] == expected(0, 22)[: len(cluster.tokens[0])]


def test_a_request_can_be_cancelled_while_the_rest_of_it_retires_to_be_computed_anew() -> None:
    cluster = cluster_of(3, 8, 8, 8)
    cluster.submit(0, array("i", range(40)), SamplingParams(max_new_tokens=16))
    decoding(cluster)
    cluster.lose_worker(cluster.life.ledger.sequences[0].home)
    assert cluster.life.requests[0].state.label == "retiring"
    cluster.stop(0)
    assert cluster.ends == {0: ("cancelled", None)}
    finish(cluster)
    assert_nothing_left(cluster)


def keep_failing(cluster: Simulated, seconds: float) -> int:
    """Fail every gang for a while, as the clock advances; returns their number."""
    failed, until = 0, cluster.now + seconds
    while cluster.now < until:
        while any(cluster.windows.values()) or any(cluster.chunks):
            cluster.fail_some_gang(GangAbortedError("a peer was silent"))
            failed += 1
        cluster.now += 0.5
        cluster.tick()
    return failed


@pytest.mark.parametrize("state", ["prefill", "decode"])
def test_a_request_survives_a_network_that_is_cut_for_less_than_a_peer_may_be_silent(state: str) -> None:
    cluster = cluster_of(4, 8, 8)
    cluster.submit(0, array("i", range(40)), SamplingParams(max_new_tokens=16))
    if state == "decode":
        decoding(cluster)
    failed = keep_failing(cluster, cluster.life.config.timeout_receive - 2)
    assert cluster.life.requests[0].state.label == state
    assert 10 < failed < 40, "it is tried all the time, and with pauses"
    finish(cluster)
    settle(cluster)
    assert cluster.ends == {0: ("length", None)}
    assert cluster.tokens[0] == expected(0, 16)
    assert_nothing_left(cluster)


@pytest.mark.parametrize("state", ["prefill", "decode"])
def test_a_gang_that_keeps_failing_fails_its_requests_and_not_for_ever(state: str) -> None:
    cluster = cluster_of(4, 8, 8)
    cluster.submit(0, array("i", range(40)), SamplingParams(max_new_tokens=16))
    if state == "decode":
        decoding(cluster)
    keep_failing(cluster, cluster.life.config.timeout_receive + 3)
    assert cluster.ends[0][0] == "error"
    assert "silent" in str(cluster.ends[0][1])
    finish(cluster)
    assert_nothing_left(cluster)


def test_a_holder_that_cannot_be_reached_does_not_fail_requests_that_do_without_it() -> None:
    cluster = cluster_of(4, 30, 8)
    cluster.submit(0, array("i", range(1000, 1040)), SamplingParams(max_new_tokens=20))
    decoding(cluster)
    home = cluster.life.ledger.sequences[0].home
    (holder,) = cluster.pools.keys() - {home}
    cluster.start_move(Move(0, 0, 4 * BLOCK, home, holder))
    while len(cluster.life.ledger.sequences[0].placement) < 2:
        cluster.step()
    assert decode(cluster, 1, 6) == home
    while 0 not in cluster.ends:
        keep_failing(cluster, 1)
    assert cluster.ends.keys() == {0}
    finish(cluster)
    assert cluster.ends[1] == ("length", None)
    assert cluster.tokens[1] == expected(1, 6)


def test_a_request_that_rests_can_be_cancelled_or_lose_a_worker() -> None:
    cluster = cluster_of(4, 12, 12, 12)
    for number in range(2):
        cluster.submit(number, array("i", range(40)), SamplingParams(max_new_tokens=16))
    keep_failing(cluster, 5)
    while any(cluster.chunks):
        cluster.fail_some_gang(GangAbortedError("a peer was silent"))
    assert not cluster.life.in_prefill, "both rest"
    cluster.stop(0)
    cluster.lose_worker(cluster.life.ledger.sequences[1].home)
    settle(cluster)
    assert cluster.ends == {0: ("cancelled", None), 1: ("length", None)}
    assert cluster.tokens[1] == expected(1, 16)
    assert_nothing_left(cluster)


def decode(cluster: Simulated, number: int, tokens: int, streamed: bool = False) -> str:
    """Submit a request and compute its prompt; returns its home."""
    sampling = SamplingParams(max_new_tokens=tokens)
    cluster.submit(number, array("i", range(8)), sampling, streamed=streamed)
    while cluster.chunks:
        cluster.run_chunk(cluster.chunks[0][0])
        cluster.chunks = [chain for chain in cluster.chunks if chain]
    return cluster.life.ledger.sequences[number].home


def test_a_request_that_joins_waits_for_one_window_at_most() -> None:
    cluster = cluster_of(5, 100)
    home = decode(cluster, 0, 40)
    running = cluster.windows[home][0]
    cluster.handle(did.WindowStarted(home, running.window))
    assert len(cluster.windows[home]) == 2, "the next window waits at the home already"
    decode(cluster, 1, 40)  # another one, whose prompt is done while the window runs
    assert len(cluster.windows[home]) == 2, "no third window, which it would have to wait for"
    cluster.windows[home].remove(running)
    nothing = WindowResult({}, {}, 0, 0)
    cluster.handle(did.WindowDone(home, running.window, 0, nothing, ()))
    cluster.run_window(cluster.windows[home][0])
    assert len(cluster.tokens[1]) > 1, "the window that was queued before it joined took it along"


def test_no_window_is_queued_behind_one_that_ends_every_sequence() -> None:
    cluster = cluster_of(6, 100, window_seconds=1, window_stream_seconds=1)
    home = decode(cluster, 0, 20)  # 1 s has 20 steps of 50 ms
    cluster.run_window(cluster.windows[home][0])  # reports how long a step takes
    running = cluster.windows[home][0]
    assert cluster.life.requests[0].remaining <= 16
    cluster.handle(did.WindowStarted(home, running.window))
    assert cluster.windows[home] == [running]
    decode(cluster, 1, 20)
    assert len(cluster.windows[home]) == 2, "but one that joins meanwhile has its next window"


@pytest.mark.parametrize("steps", [3, 16])
def test_a_limit_of_steps_is_counted_in_what_a_window_can_end(steps: int) -> None:
    cluster = cluster_of(6, 100, window_seconds=1, window_stream_seconds=1, window_steps=steps)
    home = decode(cluster, 0, 20)
    cluster.run_window(cluster.windows[home][0])
    cluster.handle(did.WindowStarted(home, cluster.windows[home][0].window))
    assert len(cluster.windows[home]) == (2 if steps == 3 else 1)


def test_windows_are_short_only_while_somebody_reads_along_or_waits() -> None:
    lengths = {"window_seconds": 2, "window_stream_seconds": 0.25}
    unwatched = cluster_of(7, 100, **lengths)
    home = decode(unwatched, 0, 200)
    assert unwatched.windows[home][0].seconds == 2
    sampling = SamplingParams(max_new_tokens=4)
    unwatched.submit(1, array("i", range(20)), sampling)  # its prompt waits for the lane
    unwatched.run_window(unwatched.windows[home][0])
    assert unwatched.windows[home][-1].seconds == 0.25
    streamed = cluster_of(7, 100, **lengths)
    assert streamed.windows[decode(streamed, 0, 200, streamed=True)][0].seconds == 0.25


def test_windows_grow_with_the_number_of_homes_and_holders_but_end_before_holders_give_up() -> None:
    def longest(workers: int, **settings: float) -> float:
        cluster = cluster_of(8, *[10] * workers, **settings)
        for number in range(workers // 2):  # each takes more than one worker has
            cluster.submit(number, array("i", range(40)), SamplingParams(max_new_tokens=20))
        finish(cluster)
        return max(cluster.lengths)

    lengths = {"window_seconds": 0.25, "window_scheduler_share": 0.2}
    assert longest(4, **lengths) == 0.25
    assert longest(8, **lengths) < longest(60, **lengths) <= 10
    assert longest(60, timeout_start=0.6, **lengths) == 0.3


def test_a_worker_that_leaves_is_emptied_while_its_requests_go_on() -> None:
    cluster = cluster_of(5, 12, 12, 12)
    for number in range(4):
        cluster.submit(number, array("i", range(20)), SamplingParams(max_new_tokens=15))
    while not all(live.state.label == "decode" for live in cluster.life.requests.values()):
        cluster.step()
    leaving = cluster.life.ledger.sequences[0].home
    cluster.drain(leaving)
    while not cluster.life.is_drained(leaving):
        assert cluster.step()
    cluster.remove(leaving)
    cluster.handle(WorkerLost(leaving))
    finish(cluster)
    assert all(cluster.tokens[number] == expected(number, 15) for number in range(4))
    assert all(reason == "length" for reason, _ in cluster.ends.values())


def test_free_room_is_given_once_in_an_event_and_by_no_start(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = cluster_of(0, 10, 10)
    admissions: list[str] = []
    monkeypatch.setattr(machine, "admit", lambda life: admissions.append("room"))
    prompt, sampling = array("i", range(8)), SamplingParams(max_new_tokens=4)
    for happen in (lambda: cluster.submit(1, prompt, sampling), cluster.tick, lambda: cluster.stop(1), cluster.tick):
        admissions.clear()
        happen()
        assert admissions == ["room"]
    admissions.clear()
    cluster.handle(did.WindowStarted("w0", 1))
    assert admissions == []
