"""The prefix cache in the lifecycle: what is reused, what is evicted, and that nothing else changes."""

from __future__ import annotations

import random
from array import array
from typing import Any

import pytest
from _examples import examples
from _simulated import BLOCK, Simulated, assert_nothing_left, cluster_of, expected, finish, settle
from hypothesis import given, settings
from hypothesis import strategies as st

from distkv_dask.errors import CapacityError
from distkv_dask.messages import to_worker as to
from distkv_dask.sampling import SamplingParams
from distkv_dask.scheduler import commands as do
from distkv_dask.scheduler.cache.beginnings import DEEPEST, prefix
from distkv_dask.scheduler.ledger.invariants import check_ledger


def text(seed: int, tokens: int) -> array[int]:
    return array("i", (random.Random(seed).randrange(10**6) for _ in range(tokens)))


def submit(cluster: Simulated, number: int, prompt: array[int], new: int = 5) -> None:
    cluster.submit(number, prompt, SamplingParams(max_new_tokens=new))


def ask(cluster: Simulated, number: int, prompt: array[int], new: int = 5) -> int:
    """Answer one request; returns how many tokens were reused."""
    submit(cluster, number, prompt, new)
    finish(cluster)
    assert cluster.tokens[number] == expected(number, new)
    return cluster.reused[number]


def said(cluster: Simulated, number: int, prompt: array[int]) -> array[int]:
    """A prompt and its answer."""
    return prompt + array("i", cluster.tokens[number])


def cached(cluster: Simulated) -> dict[str, int]:
    return {worker: account.cached for worker, account in cluster.life.ledger.workers.items()}


def test_the_same_prompt_again_computes_only_its_last_block() -> None:
    cluster = cluster_of(0, 20)
    assert ask(cluster, 1, text(1, 18)) == 0
    assert cached(cluster) == {"w0": (18 + 4) // BLOCK}  # the last token generated has no KV
    assert cluster.life.ledger.workers["w0"].used == 0
    assert ask(cluster, 2, text(1, 18)) == 16
    assert ask(cluster, 3, text(1, 16)) == 12, "one token has to be computed, for the next one"
    assert ask(cluster, 4, text(1, 10) + text(2, 10)) == 8
    assert ask(cluster, 5, text(2, 10)) == 0
    assert_nothing_left(cluster)


def test_each_turn_of_a_chat_reuses_the_turn_before() -> None:
    cluster = cluster_of(0, 100, 10)
    prompt, before = text(0, 30), 0
    for turn in range(1, 6):
        assert ask(cluster, turn, prompt, new=9) == before // BLOCK * BLOCK
        before = len(prompt) + 8
        prompt = said(cluster, turn, prompt) + text(turn, 7)
    assert_nothing_left(cluster)


def test_a_chat_of_very_many_turns_is_computed_anew_once_in_a_while() -> None:
    cluster = cluster_of(0, 1000)
    prompt, reused = text(0, 10), []
    for turn in range(1, 2 * DEEPEST + 5):
        reused.append(ask(cluster, turn, prompt, new=4))
        prompt = said(cluster, turn, prompt) + text(turn, 3)
    assert [turn for turn, tokens in enumerate(reused) if not tokens] == [
        0,
        DEEPEST,
        2 * DEEPEST,
    ]
    assert_nothing_left(cluster)


def test_a_long_beginning_over_several_workers_is_reused_where_it_lies() -> None:
    cluster = cluster_of(0, 10, 10, 10)
    prompt = text(1, 90)
    assert ask(cluster, 1, prompt) == 0
    assert len([blocks for blocks in cached(cluster).values() if blocks]) == 3
    submit(cluster, 2, prompt[:88] + text(2, 3))
    spans = cluster.life.ledger.sequences[2].placement
    assert {span.worker for span in spans if span.document == 1} == {"w0", "w1", "w2"}
    finish(cluster)
    assert cluster.reused[2] == 88
    assert cluster.tokens[2] == expected(2, 5)
    assert_nothing_left(cluster)


def test_blocks_go_only_when_their_room_is_needed_the_least_recently_used_first() -> None:
    cluster = cluster_of(0, 16)
    for number in (1, 2, 3):
        ask(cluster, number, text(number, 16), new=1)  # four blocks each
    assert ask(cluster, 4, text(1, 17), new=1) == 16  # the first was used again, and got a fifth block
    assert cached(cluster) == {"w0": 12}
    ask(cluster, 5, text(5, 19), new=1)  # needs five: the last one of the second is evicted
    assert cached(cluster) == {"w0": 15}
    assert ask(cluster, 6, text(2, 16) + text(6, 1), new=1) == 12
    assert_nothing_left(cluster)


def test_what_is_needed_is_released_before_it_is_reserved() -> None:
    cluster = cluster_of(0, 10)
    ask(cluster, 1, text(1, 36), new=4)
    commands = cluster.watch()
    cluster.submit(2, text(2, 36), SamplingParams(max_new_tokens=4))
    order = [type(command) for command in commands if isinstance(command, (to.Release, to.Free, to.Reserve))]
    assert order == [to.Release, to.Reserve]
    finish(cluster)
    assert_nothing_left(cluster)


def test_what_requests_share_is_as_large_as_the_longest_use_and_no_larger() -> None:
    cluster = cluster_of(0, 40)
    ask(cluster, 1, text(1, 80), new=1)
    used = cluster.life.ledger.workers["w0"]
    submit(cluster, 2, text(1, 8) + text(2, 4), new=21)  # shares two blocks, and has six of its own
    assert (used.used, used.cached) == (8, 18)
    submit(cluster, 3, text(1, 40) + text(3, 4), new=1)
    assert (used.used, used.cached) == (17, 10)
    while 3 not in cluster.ends:
        cluster.step()
    assert used.used == 8
    assert cluster.reused[3] == 40
    finish(cluster)
    assert cluster.reused[2] == 8
    assert_nothing_left(cluster)


def test_a_large_request_is_not_kept_waiting_by_what_is_cached() -> None:
    cluster = cluster_of(0, 10, 10)
    ask(cluster, 1, text(1, 70))
    submit(cluster, 2, text(2, 70))
    assert cluster.life.requests[2].state.label == "prefill"
    finish(cluster)
    assert_nothing_left(cluster)


def test_many_requests_with_a_short_beginning_in_common_do_not_crowd_on_one_worker() -> None:
    cluster = cluster_of(0, 100, 100, 100, window_batch=64)
    ask(cluster, 1, text(1, 8))
    homes = set()
    for number in range(2, 20):
        submit(cluster, number, text(1, 8) + text(number, 8), new=20)
    while cluster.step():
        homes |= {home for home, batch in cluster.batches.items() if batch}
    assert homes == {"w0", "w1", "w2"}
    assert_nothing_left(cluster)


def test_a_request_that_waited_finds_what_was_finished_meanwhile() -> None:
    cluster = cluster_of(0, 10)
    submit(cluster, 1, text(1, 30))
    submit(cluster, 2, text(1, 28) + text(2, 2))
    assert cluster.life.requests[2].state.label == "waiting"
    finish(cluster)
    assert cluster.reused[2] == 28
    assert_nothing_left(cluster)


def test_requests_that_were_cancelled_failed_or_shorter_than_a_block_are_not_cached() -> None:
    cluster = cluster_of(0, 20)
    submit(cluster, 1, text(1, 18), new=20)
    while len(cluster.tokens[1]) < 3:
        cluster.step()
    cluster.stop(1)
    finish(cluster)
    submit(cluster, 2, text(2, 18), new=20)
    cluster.fail_some_gang(ValueError("a fault"))
    finish(cluster)
    assert cluster.ends[2][0] == "error"
    ask(cluster, 3, text(3, 3), new=1)
    assert cached(cluster) == {"w0": 0}
    assert_nothing_left(cluster)


def test_a_request_that_its_client_ended_at_a_stop_string_is_cached() -> None:
    cluster = cluster_of(0, 20)
    submit(cluster, 1, text(1, 18), new=20)
    while len(cluster.tokens[1]) < 8:
        cluster.step()
    cluster.stop(1, "stop")
    finish(cluster)
    assert ask(cluster, 2, text(1, 18)) == 16
    assert_nothing_left(cluster)


def test_nothing_is_kept_where_the_cache_is_off() -> None:
    cluster = cluster_of(0, 20, prefix_cache=False)
    ask(cluster, 1, text(1, 18))
    assert cached(cluster) == {"w0": 0}
    assert not any(cluster.pools.values())
    assert ask(cluster, 2, text(1, 18)) == 0


def test_a_worker_that_leaves_gives_up_what_is_cached_there_at_once() -> None:
    cluster = cluster_of(0, 10, 10)
    ask(cluster, 1, text(1, 60))
    cluster.drain("w1")
    assert not cluster.pools["w1"]
    assert cluster.life.is_drained("w1")
    submit(cluster, 2, text(1, 4))
    finish(cluster)
    assert not cluster.pools["w1"]
    cluster.drain("w1", False)
    assert_nothing_left(cluster)


def test_with_a_worker_goes_what_lay_behind_its_blocks_and_what_lay_before_stays() -> None:
    cluster = cluster_of(0, 10, 10)
    prompt = text(1, 60)
    ask(cluster, 1, prompt, new=1)
    assert ask(cluster, 2, prompt + text(2, 8), new=1) == 60, "though its home is full of what it shares"
    first = prefix(cluster.life, 2, 64)[0]
    other = ({"w0", "w1"} - {first.worker}).pop()
    cluster.lose_worker(other)
    assert cluster.life.ledger.workers[first.worker].cached == first.stop // BLOCK
    assert ask(cluster, 3, prompt[: first.stop] + text(3, 4), new=1) == first.stop
    assert_nothing_left(cluster)


def test_a_request_that_loses_what_it_shares_is_computed_anew() -> None:
    cluster = cluster_of(0, 20, 20)
    ask(cluster, 1, text(1, 40), new=1)
    submit(cluster, 2, text(1, 40) + text(2, 4), new=20)
    while len(cluster.tokens[2]) < 3:
        cluster.step()
    (holder,) = {span.worker for span in cluster.life.ledger.sequences[2].placement}
    cluster.lose_worker(holder)
    finish(cluster)
    assert cluster.tokens[2] == expected(2, 20)
    assert cluster.reused[2] == 0
    assert_nothing_left(cluster)


def test_blocks_move_to_a_worker_whose_pool_is_full_of_cached_ones() -> None:
    cluster = cluster_of(0, 10, 10)
    ask(cluster, 1, text(1, 77), new=4)
    assert cached(cluster) == {"w0": 10, "w1": 10}
    submit(cluster, 2, text(2, 16), new=20)
    while len(cluster.tokens[2]) < 3:
        cluster.step()
    home = cluster.life.ledger.sequences[2].home
    cluster.drain(home)
    while not cluster.life.is_drained(home):
        assert cluster.step()
    finish(cluster)
    assert cluster.tokens[2] == expected(2, 20)
    cluster.drain(home, False)
    assert_nothing_left(cluster)


def test_what_builds_on_a_document_is_cached_until_the_document_goes() -> None:
    cluster = cluster_of(0, 40)
    cluster.ingest(0, text(0, 20))
    finish(cluster)
    cluster.ends.pop(0)
    prompt = text(0, 20) + text(1, 12)
    assert ask(cluster, 1, prompt) == 20
    assert ask(cluster, 2, prompt + text(2, 2)) == 32
    cluster.stop(0)
    assert_nothing_left(cluster)


@pytest.mark.parametrize("policy", ["overflow", "best", "dgfm", "greedy"])
@settings(max_examples=examples(30), deadline=None)
@given(st.integers(0, 2**32), st.lists(st.integers(6, 20), min_size=1, max_size=4),
       st.lists(st.tuples(st.integers(1, 60), st.integers(1, 22)), min_size=1, max_size=15))  # fmt: skip
def test_requests_with_nothing_in_common_lie_and_end_as_without_a_cache(
    policy: str, seed: int, sizes: list[int], wanted: list[tuple[int, int]]
) -> None:
    left_out = (to.Release, to.Free, do.Refuse)

    def run(prefix_cache: bool) -> tuple[list[do.Command], list[int]]:
        cluster = cluster_of(seed, *sizes, policy=policy, prefix_cache=prefix_cache)
        seen = cluster.watch()
        for number, (tokens, new) in enumerate(wanted):
            try:
                submit(cluster, number, text(number, tokens), new)
            except CapacityError:
                continue
            for _ in range(cluster.rng.randrange(20)):
                cluster.step()
        finish(cluster)
        assert_nothing_left(cluster)
        return [command for command in seen if not isinstance(command, left_out)], list(cluster.ends)

    assert run(True) == run(False)


MISHAPS = ("lose", "join", "fail", "fault", "cancel", "move", "move", "drain", "stay", "late", "rot")


def happenings(seed: int, rate: float) -> list[object]:
    """Requests that begin like earlier ones up to some length, steps between them, and a rate of mishaps."""
    draw = random.Random(seed)
    found: list[object] = []
    for _ in range(120):
        what = draw.random()
        if what < rate:
            found.append(draw.choice(MISHAPS))
        elif what < 0.35:
            found.append((draw.randint(0, 99), draw.randint(0, 40), draw.randint(0, 20), draw.randint(1, 22)))
        else:
            found.append("step")
    return found


@settings(max_examples=examples(60), deadline=None)
@given(
    st.integers(0, 2**32),
    st.lists(st.integers(8, 30), min_size=1, max_size=4),
    st.sampled_from([0.0, 0.05, 0.15]),
    st.sampled_from(["memory", "workers", "disk", "disk"]),
)
def test_whatever_happens_answers_are_right_and_cached_blocks_are_never_in_the_way(
    seed: int, sizes: list[int], rate: float, tier: str
) -> None:
    cluster = cluster_of(seed, *sizes, prefix_cache_tier=tier)
    cluster.refusing = True
    texts: list[tuple[int, array[int]]] = []
    wanted: dict[int, int] = {}
    for happening in happenings(seed, rate):
        happen(cluster, happening, texts, wanted)
    for worker in list(cluster.pools):
        cluster.drain(worker, False)
    settle(cluster)
    for number, new in wanted.items():
        right = expected(number, new)
        assert cluster.tokens[number] == right[: len(cluster.tokens[number])]
        if cluster.ends[number][0] in ("stop", "length"):
            assert cluster.tokens[number] == right
    assert_nothing_left(cluster)


def happen(cluster: Simulated, happening: object, texts: list[tuple[int, array[int]]], wanted: dict[int, int]) -> None:
    match happening:
        case (like, most, more, new):
            number = len(wanted)
            prompt = array("i", [number])
            if texts:
                before, beginning = texts[like % len(texts)]
                prompt = said(cluster, before, beginning)[: BLOCK * most] + text(number, more) + prompt
            try:
                submit(cluster, number, prompt, new)
            except CapacityError:
                return
            texts.append((number, prompt))
            wanted[number] = new
        case "cancel":
            if wanted:
                cluster.stop(cluster.rng.choice(sorted(wanted)))
        case "step":
            for _ in range(3):
                cluster.step()
        case str():
            cluster.happen(happening)


def test_a_policy_that_fails_about_a_cached_prefix_leaves_nothing_reserved(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = cluster_of(0, 20)
    ask(cluster, 1, text(1, 18))
    ledger, kind = cluster.life.ledger, type(cluster.life.policy)
    place, asked = kind.place, []

    def fail_if_supposed(*arguments: Any) -> Any:
        asked.append(2 in ledger.sequences)
        if asked[-1]:
            raise RuntimeError("a fault of the policy")
        return place(*arguments)

    monkeypatch.setattr(kind, "place", fail_if_supposed)
    with pytest.raises(RuntimeError, match="a fault of the policy"):
        submit(cluster, 2, text(1, 18))
    assert asked == [False, True]
    assert 2 not in ledger.sequences
    assert ledger.workers["w0"].used == 0
    check_ledger(ledger)
