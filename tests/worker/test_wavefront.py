"""Chunks of one prompt that are computed at the same time give the same tokens as one after the other."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from _channels import TCP, Way
from _examples import examples
from _fakes import GREEDY, NEW, PROMPT, ROOM, Fleet, Recorder, fleet, loaded, reference, state
from _models import prompt_ids
from hypothesis import given, settings
from hypothesis import strategies as st

from distkv_dask.errors import ChannelTimeoutError, DistKVError, GangAbortedError, PlanError
from distkv_dask.gang import Earlier, PrefillChunk
from distkv_dask.placement import Placement
from distkv_dask.worker.holder.session import Session


def chunks_of(made: Fleet, sequence: int, placement: Placement, prompt: Sequence[int]) -> list[PrefillChunk]:
    """A chunk for each span, each of which follows all before it."""
    chunks: list[PrefillChunk] = []
    for span in placement:
        stop = min(span.stop, len(prompt))
        holders = sorted({one.worker for one in placement if one.start < stop} - {span.worker})
        follows = tuple(Earlier(chunk.gang.number, chunk.gang.home) for chunk in chunks)
        gang = replace(made.gang(span.worker, holders), follows=follows)
        sampling = GREEDY if stop == len(prompt) else None
        chunks.append(PrefillChunk(gang, sequence, placement, span.start, tuple(prompt[span.start : stop]), sampling))
    return chunks


def start(made: Fleet, chunk: PrefillChunk) -> tuple[Future[Any], list[Session]]:
    """Submit a chunk to its home's lane, and open its sessions."""
    sessions = [made.members[holder.worker].runtime.open_session(chunk.gang) for holder in chunk.gang.holders]
    home = made.members[chunk.gang.home]
    return home.lanes.home.submit(home.runtime.prefill, chunk), sessions


def prefill(made: Fleet, placement: Placement, prompt: Sequence[int], sequence: int = 1) -> int:
    """Compute all chunks of a prompt at once; returns the first token."""
    under_way = [start(made, chunk) for chunk in chunks_of(made, sequence, placement, prompt)]
    for _, sessions in under_way:
        for session in sessions:
            session.wait(60)
    return [future.result(60).token for future, _ in under_way][-1]


def decoded(made: Fleet, placement: Placement, first: int, length: int = PROMPT, new: int = NEW) -> list[int]:
    """The whole answer."""
    result, _ = made.decode(placement[-1].worker, [state(1, placement, length, first, new - 1)], new)
    return [first, *result.tokens[1]]


@pytest.mark.parametrize(
    "room",
    [
        [("w0", 32), ("w1", ROOM)],
        [("w0", 8), ("w1", 24), ("w0", 16), ("w1", ROOM)],
        [("w0", 8), ("w1", 8), ("w2", 24), ("w0", 16), ("w1", ROOM)],
        [("w2", 16), ("w2", 8), ("w0", 24), ("w1", 8), ("w2", ROOM)],
    ],
    ids=["two halves", "in turns", "three workers", "two of one worker"],
)
@pytest.mark.parametrize("family", ["llama-gqa", "gemma2-short", "mistral-window", "gpt-oss-short", "deepseek-v3"])
def test_chunks_at_once_give_the_tokens_and_logits_of_one_process(family: str, room: list[tuple[str, int]]) -> None:
    model = Recorder(loaded(family))
    with fleet(model, 3) as made:
        placement = made.place(1, *room)
        first = prefill(made, placement, prompt_ids(PROMPT))
        last = next(one for one in model.logits if len(one))
        assert torch.allclose(last, reference(family).logits[:1], atol=1e-4, rtol=1e-4)
        assert decoded(made, placement, first) == reference(family).tokens


def test_chunks_follow_each_other_over_every_channel(way: Way) -> None:
    with fleet(loaded("llama-gqa"), 2, way) as made:
        placement = made.place(1, ("w0", 16), ("w1", 24), ("w0", 16), ("w1", ROOM))
        assert decoded(made, placement, prefill(made, placement, prompt_ids(PROMPT))) == reference("llama-gqa").tokens


@settings(max_examples=examples(15), deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["w0", "w1", "w2"]), st.integers(1, 4)), min_size=1, max_size=8))
def test_any_chunks_on_any_workers_give_the_same_tokens(room: list[tuple[str, int]]) -> None:
    sized = [(worker, blocks * 8) for worker, blocks in room]
    length = min(PROMPT, sum(tokens for _, tokens in sized))
    with fleet(loaded("llama-gqa"), 3) as made:
        placement = made.place(1, *sized[:-1], (sized[-1][0], ROOM))
        used = tuple(span for span in placement if span.start < length)
        placement = (*used[:-1], replace(used[-1], stop=max(used[-1].stop, length)))
        first = prefill(made, placement, prompt_ids(length))
        assert first == reference("llama-gqa", length).tokens[0]


def is_held(made: Fleet, worker: str) -> bool:
    """Whether a question waits at a holder."""
    lane = made.members[worker].lanes.holder
    return lane.submit(lambda: any(home.is_held for home in lane._connections._connections)).result()


def wait_until_held(made: Fleet, worker: str) -> None:
    deadline = time.monotonic() + 20
    while not is_held(made, worker):
        assert time.monotonic() < deadline
        time.sleep(0.002)


@contextmanager
def following(way: Way = TCP, **limits: float) -> Iterator[tuple[Fleet, list[PrefillChunk], Future[Any], Session]]:
    """Start the second of two chunks, which waits for the first, which has not started."""
    with fleet(loaded("llama-gqa"), 2, way, **limits) as made:
        placement = made.place(1, ("w0", 40), ("w1", ROOM))
        chunks = chunks_of(made, 1, placement, prompt_ids(PROMPT))
        future, sessions = start(made, chunks[1])
        yield made, chunks, future, sessions[0]


def test_a_holder_says_nothing_about_kv_that_is_not_there_yet(way: Way) -> None:
    with following(way) as (made, chunks, future, session):
        wait_until_held(made, "w0")
        assert not future.done()
        start(made, chunks[0])[0].result(60)
        session.wait(60)
        assert decoded(made, chunks[0].placement, future.result(60).token) == reference("llama-gqa").tokens


def test_a_chunk_may_follow_one_that_is_computed_with_other_prompts() -> None:
    with following() as (made, chunks, future, session):
        other = PrefillChunk(made.gang("w0", []), 2, made.place(2, ("w0", ROOM)), 0, tuple(prompt_ids(9, 2)), GREEDY)
        home = made.members["w0"]
        both = home.lanes.home.submit(home.runtime.prefill_together, [other, chunks[0]]).result(60)
        session.wait(60)
        assert [one.token for one in both] == [reference("llama-gqa", 9, 2).tokens[0], None]
        assert decoded(made, chunks[0].placement, future.result(60).token) == reference("llama-gqa").tokens


def test_a_chunk_ends_at_once_when_the_one_that_it_follows_fails() -> None:
    with following() as (made, chunks, future, session):
        wait_until_held(made, "w0")
        with pytest.raises(PlanError):  # there is no room for it
            start(made, replace(chunks[0], placement=()))[0].result(60)
        with pytest.raises(GangAbortedError, match=r"which this one follows, failed: .*room reserved for 0"):
            future.result(60)
        with pytest.raises(GangAbortedError):
            session.wait(60)


def test_a_chunk_does_not_begin_where_one_that_it_follows_failed() -> None:
    with fleet(loaded("llama-gqa"), 1) as made:
        chunks = chunks_of(made, 1, made.place(1, ("w0", 40), ("w0", ROOM)), prompt_ids(PROMPT))
        with pytest.raises(PlanError):
            start(made, replace(chunks[0], placement=()))[0].result(60)
        with pytest.raises(GangAbortedError, match="was not completed here"):
            start(made, chunks[1])[0].result(60)


def test_a_chunk_that_waits_ends_when_it_is_cancelled_at_its_home_or_where_it_waits() -> None:
    for worker in ("w0", "w1"):
        with following() as (made, chunks, future, session):
            wait_until_held(made, "w0")
            made.members[worker].runtime.abort(chunks[1].gang.number, "cancelled")
            with pytest.raises(GangAbortedError, match="cancelled"):
                future.result(60)
            made.members["w0"].runtime.abort(chunks[1].gang.number, "cancelled")
            with pytest.raises(GangAbortedError):
                session.wait(60)
            assert not is_held(made, "w0")


def test_a_chunk_does_not_wait_forever_for_one_that_never_begins() -> None:
    with following(timeout_receive=0.3) as (_, _, future, session):
        with pytest.raises(ChannelTimeoutError, match=r"distkv\.timeouts\.receive"):
            future.result(60)
        with pytest.raises(DistKVError):
            session.wait(60)
