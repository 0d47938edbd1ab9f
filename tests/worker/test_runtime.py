"""Wherever a sequence's KV lies, its tokens are those of one process; whatever a peer does, the next window works."""

from __future__ import annotations

import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache

import pytest
import torch
from _fakes import BLOCK_TOKENS, GREEDY, Fleet, Recorder, fleet, loaded
from _models import Reference, model_dir, prompt_ids, reference_generate

from distkv_dask.errors import (
    CapacityError,
    ChannelError,
    ChannelTimeoutError,
    DistKVError,
    EngineClosedError,
    GangAbortedError,
    ModelError,
)
from distkv_dask.types import DecodeWindow, Endpoint, PrefillChunk, SamplingParams, SequenceState
from distkv_dask.worker.channels.frames import HEADER_BYTES, Header, Kind, parse_header
from distkv_dask.worker.runtime import Runtime

FAMILIES = ["llama-mha", "llama-gqa", "llama-mqa", "qwen3"]  # head dims 64, 64, 80, 128
PROMPT, NEW = 70, 14
ROOM = PROMPT + NEW + BLOCK_TOKENS


@cache
def reference(family: str, prompt: int = PROMPT, seed: int = 0, new: int = NEW) -> Reference:
    return reference_generate(model_dir(family), [prompt_ids(prompt, seed)], new)[0]


def state(sequence: int, placement, length: int, token: int, remaining: int, **sampling) -> SequenceState:
    return SequenceState(sequence, placement, length, token, remaining, replace(GREEDY, **sampling))


def generate(made: Fleet, placement, home: str, window: int = 5, chunk: int = 24, prefill_at: str | None = None):
    first = made.prefill(1, placement, prompt_ids(PROMPT), chunk, prefill_at)
    tokens, batch = [first], [state(1, placement, PROMPT, first, NEW - 1)]
    while batch:
        result, batch = made.decode(home, batch, window)
        tokens += result.tokens[1]
    assert result.finished == {1: "length"}
    return tokens


SPLITS = {
    "all at home": [("w0", ROOM)],
    "all at a holder": [("w1", ROOM)],
    "tail at home": [("w1", 48), ("w0", ROOM)],
    "tail remote": [("w0", 48), ("w1", ROOM)],
    "one token remote": [("w1", 1), ("w0", ROOM)],
    "one token at home": [("w0", 1), ("w1", ROOM)],
    "one token before the tail": [("w0", PROMPT - 1), ("w1", 1), ("w2", ROOM)],
    "tail begins with decode": [("w0", PROMPT), ("w1", ROOM)],
    "tail moves on while decoding": [("w1", 40), ("w0", PROMPT - 40 + 3), ("w2", 4), ("w3", 2), ("w4", ROOM)],
    "an empty span ahead": [("w1", 33), ("w0", ROOM), ("w2", 16)],
    "five workers": [("w3", 17), ("w1", 5), ("w4", 30), ("w0", 11), ("w2", ROOM)],
}


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_and_logits_are_those_of_one_process_for_every_split(family: str) -> None:
    model = Recorder(loaded(family))
    right = reference(family)
    with fleet(model, 5) as made:
        for name, room in SPLITS.items():
            model.logits.clear()
            placement = made.place(1, *room)
            assert generate(made, placement, "w0") == right.tokens, name
            logits = torch.cat(model.logits[-NEW:])
            assert torch.allclose(logits, right.logits, atol=1e-4, rtol=1e-4), name
            made.release(1)
        assert all(member.pool.used_blocks == 0 for member in made.members.values())


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("chunk", [1, 7, 100])
def test_any_number_of_workers_and_any_chunks_give_the_same_tokens(size: int, chunk: int) -> None:
    with fleet(loaded("llama-gqa"), size) as made:
        share = -(-ROOM // size)
        placement = made.place(1, *((worker, share) for worker in made.members))
        for home in made.members:
            assert generate(made, placement, home, chunk=chunk) == reference("llama-gqa").tokens


@pytest.mark.parametrize("room", [[("w1", ROOM)], [("w0", 30), ("w1", 20), ("w2", ROOM)], [("w1", 30), ("w0", ROOM)]])
def test_one_home_can_compute_chunks_whose_kv_belongs_to_others(room: list[tuple[str, int]]) -> None:
    with fleet(loaded("qwen2"), 3) as made:
        placement = made.place(1, *room)
        gang = made.gang("w0", [worker for worker, _ in room if worker != "w0"])
        ids = tuple(prompt_ids(PROMPT))
        chunk = PrefillChunk(gang, 1, placement, 0, ids, GREEDY)  # crosses spans
        first = made.run(gang, lambda runtime: runtime.prefill(chunk))
        result, _ = made.decode("w0", [state(1, placement, PROMPT, first, NEW - 1)], NEW)
        assert [first, *result.tokens[1]] == reference("qwen2").tokens


def test_sequences_join_at_different_windows_and_leave_when_they_stop() -> None:
    family, lengths = "llama-gqa", (70, 9, 33, 50)
    rooms = [
        [("w1", 40), ("w0", 60)],
        [("w0", 40)],
        [("w0", 20), ("w2", 60)],
        [("w2", 16), ("w1", 16), ("w0", 50)],
    ]
    counts = (14, 4, 9, 11)
    with fleet(loaded(family), 3) as made:
        tokens: dict[int, list[int]] = {}
        waiting = list(enumerate(zip(lengths, rooms, counts, strict=True)))
        batch: list[SequenceState] = []
        while waiting or batch:
            if waiting:
                sequence, (length, room, count) = waiting.pop(0)
                placement = made.place(sequence, *room)
                first = made.prefill(sequence, placement, prompt_ids(length, sequence))
                tokens[sequence] = [first]
                batch.append(state(sequence, placement, length, first, count - 1))
            result, batch = made.decode("w0", batch, 3)
            for sequence, new in result.tokens.items():
                tokens[sequence] += new
        for sequence, (length, count) in enumerate(zip(lengths, counts, strict=True)):
            assert tokens[sequence] == reference(family, length, sequence).tokens[:count]


def test_homes_that_hold_for_each_other_do_not_deadlock() -> None:
    with fleet(loaded("llama-gqa"), 2) as made:
        for sequence, (first, second) in enumerate((("w0", "w1"), ("w1", "w0"))):
            placement = made.place(sequence, (second, 40), (first, ROOM))
            made.prefill(sequence, placement, prompt_ids(PROMPT))
        results = {}

        def run(sequence: int, home: str, other: str) -> None:
            placement = made.place(sequence, (other, 40), (home, ROOM))
            token = reference("llama-gqa").tokens[0]
            results[home], _ = made.decode(home, [state(sequence, placement, PROMPT, token, NEW - 1)], NEW)

        threads = [threading.Thread(target=run, args=args) for args in ((0, "w0", "w1"), (1, "w1", "w0"))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert results["w0"].tokens[0] == results["w1"].tokens[1] == reference("llama-gqa").tokens[1:]


def test_an_end_of_sequence_token_ends_its_sequence_alone_and_is_not_returned() -> None:
    tokens = reference("llama-gqa").tokens
    model = Recorder(loaded("llama-gqa"))
    at = next(at for at in range(2, NEW) if tokens[at] not in tokens[:at])
    model.eos_token_ids = frozenset({tokens[at]})
    with fleet(model, 2) as made:
        placement = made.place(1, ("w1", 40), ("w0", ROOM))
        other = made.place(2, ("w1", 40), ("w0", ROOM))
        for sequence, where in ((1, placement), (2, other)):
            made.prefill(sequence, where, prompt_ids(PROMPT))
        batch = [
            state(1, placement, PROMPT, tokens[0], NEW - 1, ignore_eos=False),
            state(2, other, PROMPT, tokens[0], NEW - 1),
        ]
        result, left = made.decode("w0", batch, 100)
        assert result.tokens == {1: tokens[1:at], 2: tokens[1:]}
        assert result.finished == {1: "stop", 2: "length"}
        assert result.steps == NEW - 1
        assert left == []


def test_a_window_ends_in_time_and_counts_its_steps() -> None:
    with fleet(loaded("llama-gqa"), 1) as made:
        placement = made.place(1, ("w0", ROOM))
        first = made.prefill(1, placement, prompt_ids(PROMPT))
        window = DecodeWindow(made.gang("w0", []), 0, 100, 0.0)
        batch = [state(1, placement, PROMPT, first, NEW)]
        result = made.run(window.gang, lambda runtime: runtime.decode(window, batch))
        assert (result.steps, len(result.tokens[1]), result.finished) == (1, 1, {})


def test_a_window_that_is_run_again_draws_the_same_tokens() -> None:
    sampled = SamplingParams(temperature=1.5, top_p=0.9, seed=5, repetition_penalty=1.2, ignore_eos=True)
    with fleet(loaded("llama-gqa"), 2) as made:
        placement = made.place(1, ("w1", 40), ("w0", ROOM))
        first = made.prefill(1, placement, prompt_ids(PROMPT))
        history = (*prompt_ids(PROMPT), first)
        one = SequenceState(1, placement, PROMPT, first, NEW, sampled, history)
        results = [made.decode("w0", [one], NEW)[0].tokens for _ in range(3)]
        halves = made.decode("w0", [one], 5)[0].tokens[1]
        rest = replace(one, length=PROMPT + 5, last_token=halves[-1], remaining=NEW - 5, history=(*history, *halves))
        halves = halves + made.decode("w0", [rest], NEW)[0].tokens[1]
        assert results[0] == results[1] == results[2] == {1: halves}
        assert len(set(halves)) > 3


# Failures


class BadHolder:
    """A holder that answers HELLO and BEGIN well, and then behaves as told."""

    def __init__(self, behave: Callable[[socket.socket, Header], None], welcome: bool = True) -> None:
        self.stop = threading.Event()
        self._behave = behave
        self._welcome = welcome
        self._server = socket.create_server(("127.0.0.1", 0))
        self.endpoint = Endpoint("w9", "127.0.0.1", self._server.getsockname()[1])
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        peer, _ = self._server.accept()
        with peer:
            for answer in (Kind.WELCOME, Kind.READY):
                header = read(peer)
                if not self._welcome:
                    break
                peer.sendall(header._replace(kind=answer, length=0).pack())
            else:
                self._behave(peer, read(peer))
            self.stop.wait(30)

    def close(self) -> None:
        self.stop.set()
        self._thread.join()
        self._server.close()


def read(peer: socket.socket) -> Header:
    header = parse_header(peer.recv(HEADER_BYTES, socket.MSG_WAITALL))
    assert header is not None
    peer.recv(header.length, socket.MSG_WAITALL)
    return header


def partial(header: Header, **changes: int) -> bytes:
    answer = header._replace(kind=Kind.PARTIAL, scale=0.0, length=6 * 65 * 4, **changes)
    return answer.pack() + bytes(answer.length)


def shut(peer: socket.socket) -> None:
    peer.shutdown(socket.SHUT_RDWR)


def reset(peer: socket.socket) -> None:
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    peer.close()


MISBEHAVIOUR: dict[str, tuple[Callable[[socket.socket, Header], object], type[Exception], str]] = {
    "is killed": (lambda peer, ask: reset(peer), ChannelError, "w9"),
    "leaves": (lambda peer, ask: shut(peer), ChannelError, "w9 closed"),
    "is frozen": (lambda peer, ask: None, ChannelTimeoutError, "w9 did not send"),
    "is frozen in a frame": (lambda peer, ask: peer.send(partial(ask)[:500]), ChannelTimeoutError, "w9 did not send"),
    "dies in a frame": (lambda peer, ask: (peer.send(partial(ask)[:500]), shut(peer)), ChannelError, "into a frame"),
    "talks rubbish": (lambda peer, ask: peer.send(b"\xff" * 5000), ChannelError, "no frame"),
    "answers for an old epoch": (lambda peer, ask: peer.send(partial(ask, epoch=0)), ChannelError, "epoch 0.*epoch 1"),
    "answers another step": (lambda peer, ask: peer.send(partial(ask, step=8)), ChannelError, "step 8.*step 0"),
}


def endings(made: Fleet, endpoint: Endpoint, others: tuple[str, ...] = ()) -> tuple[Exception, list[Exception], float]:
    """Decode with a bad holder: the errors of home and other holders, and the seconds that it took."""
    room = [(worker, 8) for worker in others]
    placement = made.place(1, *room, ("w0", ROOM - 8 * len(room)))
    bad = replace(placement[-1], worker="w9", start=placement[-1].start, stop=PROMPT - 1)
    tail = replace(placement[-1], start=PROMPT - 1, stop=ROOM)
    placement = (*placement[:-1], bad, tail)
    gang = made.gang("w0", others)
    gang = replace(gang, holders=(*gang.holders, endpoint))
    window = DecodeWindow(gang, 0, 5, 60.0)
    batch = [state(1, placement, PROMPT, 1, 5)]
    sessions = [made.members[worker].runtime.open_session(gang) for worker in others]
    home, began = made.members["w0"], time.monotonic()
    future = home.lanes.home.submit(home.runtime.decode, window, batch)
    error = future.exception(20)
    seen = [session.result.exception(20) for session in sessions]
    made.release(1)
    assert isinstance(error, Exception)
    return error, [one for one in seen if isinstance(one, Exception)], time.monotonic() - began


def works(made: Fleet) -> bool:
    placement = made.place(1, ("w1", 40), ("w0", ROOM))
    tokens = generate(made, placement, "w0")
    made.release(1)
    return tokens == reference("llama-gqa").tokens


@pytest.mark.parametrize("behaviour", MISBEHAVIOUR)
@pytest.mark.parametrize("others", [(), ("w1",)])
def test_a_holder_that_misbehaves_ends_the_gang_in_time_and_the_next_window_works(
    behaviour: str, others: tuple[str, ...]
) -> None:
    behave, kind, text = MISBEHAVIOUR[behaviour]
    with fleet(loaded("llama-gqa"), 2, timeout_receive=0.5) as made:
        assert works(made)
        holder = BadHolder(behave)
        try:
            error, others_errors, seconds = endings(made, holder.endpoint, others)
        finally:
            holder.close()
        assert isinstance(error, ChannelTimeoutError if others and kind is ChannelTimeoutError else kind)
        assert isinstance(error, DistKVError)
        assert len(others_errors) == len(others)
        for other in others_errors:
            assert isinstance(other, GangAbortedError)
            assert "home w0 failed" in str(other)
        if not others or kind is not ChannelTimeoutError:
            assert re.search(text, str(error))
        assert seconds < 5
        assert works(made)


def test_a_holder_that_never_welcomes_ends_the_gang_in_time() -> None:
    with fleet(loaded("llama-gqa"), 2, timeout_receive=0.5) as made:
        holder = BadHolder(lambda peer, ask: None, welcome=False)
        error, _, seconds = endings(made, holder.endpoint)
        holder.close()
        assert isinstance(error, ChannelTimeoutError)
        assert seconds < 5
        assert works(made)


def test_a_holder_that_is_gone_ends_the_gang_and_tells_the_others() -> None:
    with fleet(loaded("llama-gqa"), 2) as made:
        with socket.create_server(("127.0.0.1", 0)) as server:
            endpoint = Endpoint("w9", "127.0.0.1", server.getsockname()[1])
        gang_error, others, seconds = endings(made, endpoint, ("w1",))
        assert isinstance(gang_error, ChannelError)
        assert [type(error) for error in others] == [GangAbortedError]
        assert seconds < 5
        assert works(made)


def test_a_session_that_never_opens_ends_the_gang_with_the_start_limit() -> None:
    with fleet(loaded("llama-gqa"), 2, timeout_start=0.5) as made:
        placement = made.place(1, ("w1", 40), ("w0", ROOM))
        window = DecodeWindow(made.gang("w0", ["w1"]), 0, 5, 60.0)
        home = made.members["w0"]
        future = home.lanes.home.submit(home.runtime.decode, window, [state(1, placement, PROMPT, 1, 5)])
        with pytest.raises((ChannelTimeoutError, GangAbortedError), match=r"READY|distkv.timeouts.start"):
            future.result(10)
        made.release(1)
        assert works(made)


def test_a_model_that_fails_tells_the_holders_and_leaves_the_lane_usable() -> None:
    class Broken(Recorder):
        broken = False

        def forward(self, *args):
            if self.broken and len(self.logits) >= 2:
                raise RuntimeError("no memory left")
            return super().forward(*args)

    model = Broken(loaded("llama-gqa"))
    with fleet(model, 2) as made:
        placement = made.place(1, ("w1", 40), ("w0", ROOM))
        first = made.prefill(1, placement, prompt_ids(PROMPT))
        gang = made.gang("w0", ["w1"])
        session = made.members["w1"].runtime.open_session(gang)
        model.broken = True
        with pytest.raises(RuntimeError, match="no memory left"):
            made.members["w0"].lanes.home.submit(
                made.members["w0"].runtime.decode,
                DecodeWindow(gang, 0, 5, 60.0),
                [state(1, placement, PROMPT, first, 5)],
            ).result(20)
        with pytest.raises(GangAbortedError, match="RuntimeError: no memory left"):
            session.wait(5)
        model.broken = False
        made.release(1)
        assert works(made)


@pytest.mark.parametrize("where", ["home", "holder"])
def test_an_abort_from_another_thread_ends_all_members(where: str) -> None:
    with fleet(loaded("llama-gqa"), 2) as made:
        placement = made.place(1, ("w1", 40), ("w0", ROOM))
        gang = made.gang("w0", ["w1"])
        home, holder = made.members["w0"], made.members["w1"]
        batch = [state(1, placement, PROMPT, 1, 5)]
        if where == "holder":
            session = holder.runtime.open_session(gang)
            holder.runtime.abort(gang.number, "w7 died")
        future = home.lanes.home.submit(home.runtime.decode, DecodeWindow(gang, 0, 5, 60.0), batch)
        if where == "home":  # it waits for a session that does not open
            time.sleep(0.2)
            home.runtime.abort(gang.number, "w7 died")
        with pytest.raises(GangAbortedError, match="w7 died"):
            future.result(5)
        if where != "holder":
            session = holder.runtime.open_session(gang)
        with pytest.raises((GangAbortedError, ChannelError)):
            session.wait(5)
        home.runtime.abort(gang.number, "again")
        made.release(1)
        assert works(made)


def test_an_abort_ends_a_home_that_waits_for_a_frozen_holder() -> None:
    with fleet(loaded("llama-gqa"), 2) as made:
        asked = threading.Event()
        holder = BadHolder(lambda peer, ask: asked.set())
        placement = made.place(1, ("w0", ROOM))
        placement = (replace(placement[0], worker="w9", stop=40), replace(placement[0], start=40))
        gang = replace(made.gang("w0", []), holders=(holder.endpoint,))
        home = made.members["w0"]
        batch = [state(1, placement, PROMPT, 1, 5)]
        future = home.lanes.home.submit(home.runtime.decode, DecodeWindow(gang, 0, 5, 60.0), batch)
        assert asked.wait(5)
        home.runtime.abort(gang.number, "w9 is frozen")
        with pytest.raises(GangAbortedError, match="w9 is frozen"):
            future.result(5)
        holder.close()
        made.release(1)
        assert works(made)


def test_a_placement_without_room_is_an_error_of_ours() -> None:
    with fleet(loaded("llama-gqa"), 1) as made:
        placement = made.place(1, ("w0", PROMPT + 2))
        first = made.prefill(1, placement, prompt_ids(PROMPT))
        with pytest.raises(CapacityError, match="room reserved for 72"):
            made.decode("w0", [state(1, placement, PROMPT, first, 9)], 9)
        with pytest.raises(CapacityError, match="kv-memory"):
            made.place(2, ("w0", 10**6))


def test_a_worker_without_weights_holds_but_does_not_compute() -> None:
    with fleet(loaded("llama-gqa"), 2) as made:
        holder = made.members["w1"]
        holder.runtime.close()
        holder.runtime = Runtime(made.spec, None, holder.pool, holder.lanes)
        placement = made.place(1, ("w1", 40), ("w0", ROOM))
        gang = made.gang("w0", ["w1"])
        chunk = PrefillChunk(gang, 1, placement, 0, tuple(prompt_ids(PROMPT)), GREEDY)
        first = made.run(gang, lambda runtime: runtime.prefill(chunk))
        assert first == reference("llama-gqa").tokens[0]
        with pytest.raises(ModelError, match="no model"):
            holder.runtime.decode(DecodeWindow(gang, 0, 1, 1.0), [])


@contextmanager
def at_once(made: Fleet) -> Iterator[None]:
    began = time.monotonic()
    yield
    made.close()
    assert time.monotonic() - began < 10


def test_closing_ends_a_home_that_waits_and_a_session_that_serves() -> None:
    made = Fleet(loaded("llama-gqa"), 2)
    with at_once(made):
        placement = made.place(1, ("w1", 40), ("w0", ROOM))
        home, holder = made.members["w0"], made.members["w1"]
        waiting = made.gang("w0", ["w1"])
        future = home.lanes.home.submit(
            home.runtime.decode, DecodeWindow(waiting, 0, 5, 60.0), [state(1, placement, PROMPT, 1, 5)]
        )
        session = holder.runtime.open_session(made.gang("w0", ["w1"]))
        time.sleep(0.1)
        home.runtime.close()
        with pytest.raises(GangAbortedError, match="engine was closed"):
            future.result(5)
        holder.runtime.close()
        with pytest.raises(GangAbortedError, match="engine was closed"):
            session.wait(5)
        with pytest.raises(EngineClosedError):
            holder.runtime.open_session(waiting)
