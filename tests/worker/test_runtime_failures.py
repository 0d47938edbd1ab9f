"""Whatever a peer does, every member of the gang gets an error of ours in time and the next window works."""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
from _channels import UCX, Bare, Way
from _fakes import GREEDY, NEW, PROMPT, ROOM, Fleet, Recorder, fleet, generate, loaded, reference, state
from _models import prompt_ids
from _peers import BadHolder

from distkv_dask.errors import (
    CapacityError,
    ChannelError,
    ChannelTimeoutError,
    DistKVError,
    EngineClosedError,
    GangAbortedError,
    ModelError,
    PlanError,
)
from distkv_dask.gang import DecodeWindow, PrefillChunk
from distkv_dask.placement import Endpoint
from distkv_dask.worker.channels.frames import Header, Kind, failure_frame
from distkv_dask.worker.home import gang as home_gang
from distkv_dask.worker.runtime import Runtime


def silence(way: Way) -> float:
    """Seconds that a peer may be silent; over UCX, a busy machine needs more to connect, as both ends must poll."""
    return 3.0 if way is UCX else 1.0


def partial(header: Header, **changes: int) -> bytes:
    answer = header._replace(kind=Kind.PARTIAL, scale=0.0, length=6 * 65 * 4, **changes)
    return answer.pack() + bytes(answer.length)


def failed(header: Header) -> bytes:
    return b"".join(failure_frame(header.gang, header.epoch, "no memory left"))


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
    "says that it failed": (lambda peer, ask: peer.send(failed(ask)), GangAbortedError, "w9 failed: no memory left"),
    "talks rubbish": (lambda peer, ask: peer.send(b"\xff" * 5000), ChannelError, "no frame"),
    "answers for an old epoch": (lambda peer, ask: peer.send(partial(ask, epoch=0)), ChannelError, "epoch 0.*epoch 1"),
    "answers another step": (lambda peer, ask: peer.send(partial(ask, step=8)), ChannelError, "step 8.*step 0"),
}


def endings(made: Fleet, endpoint: Endpoint, others: tuple[str, ...] = ()) -> tuple[Exception, list[Exception], float]:
    """Decode with a bad holder; returns the errors of home and other holders, and the seconds that it took."""
    room = [(worker, 8) for worker in others]
    placement = made.place(1, *room, ("w0", ROOM - 8 * len(room)))
    bad = replace(placement[-1], worker="w9", start=placement[-1].start, stop=64)
    tail = replace(placement[-1], start=64, stop=ROOM)
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
    made.release_sequence(1)
    assert isinstance(error, Exception)
    return error, [one for one in seen if isinstance(one, Exception)], time.monotonic() - began


def works(made: Fleet) -> bool:
    placement = made.place(1, ("w1", 40), ("w0", ROOM))
    tokens = generate(made, placement, "w0")
    made.release_sequence(1)
    return tokens == reference("llama-gqa").tokens


@pytest.mark.parametrize("behaviour", MISBEHAVIOUR)
@pytest.mark.parametrize("others", [(), ("w1",)])
def test_a_holder_that_misbehaves_ends_the_gang_in_time_and_the_next_window_works(
    way: Way, behaviour: str, others: tuple[str, ...]
) -> None:
    behave, kind, text = MISBEHAVIOUR[behaviour]
    with fleet(loaded("llama-gqa"), 2, way, timeout_receive=silence(way)) as made:
        assert works(made)
        holder = BadHolder(behave, way=way)
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
        assert seconds < 10
        assert works(made)


def test_a_holder_that_never_welcomes_ends_the_gang_in_time(way: Way) -> None:
    with fleet(loaded("llama-gqa"), 2, way, timeout_receive=silence(way)) as made:
        holder = BadHolder(lambda peer, ask: None, welcome=False, way=way)
        error, _, seconds = endings(made, holder.endpoint)
        holder.close()
        assert isinstance(error, ChannelTimeoutError)
        assert seconds < 10
        assert works(made)


def test_a_holder_that_is_gone_ends_the_gang_and_tells_the_others(way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(home_gang, "TELL_SECONDS", 10.0)  # a busy machine may need more than a second to connect
    with fleet(loaded("llama-gqa"), 2, way) as made:
        server = Bare(way)
        server.close()
        endpoint = replace(server.endpoint, worker="w9")
        gang_error, others, seconds = endings(made, endpoint, ("w1",))
        assert isinstance(gang_error, ChannelError)
        assert [type(error) for error in others] == [GangAbortedError]
        assert seconds < 10
        assert works(made)


def test_a_session_that_never_opens_ends_the_gang_with_the_start_limit(way: Way) -> None:
    with fleet(loaded("llama-gqa"), 2, way, timeout_start=2.0) as made:
        placement = made.place(1, ("w1", 40), ("w0", ROOM))
        window = DecodeWindow(made.gang("w0", ["w1"]), 0, 5, 60.0)
        home = made.members["w0"]
        future = home.lanes.home.submit(home.runtime.decode, window, [state(1, placement, PROMPT, 1, 5)])
        with pytest.raises((ChannelTimeoutError, GangAbortedError), match=r"distkv.timeouts.start"):
            future.result(10)
        made.release_sequence(1)
        assert works(made)


def test_a_model_that_fails_tells_the_holders_and_leaves_the_lane_usable(way: Way) -> None:
    class Broken(Recorder):
        broken = False

        def forward(self, *args):
            if self.broken and len(self.logits) >= 2:
                raise RuntimeError("no memory left")
            return super().forward(*args)

    model = Broken(loaded("llama-gqa"))
    with fleet(model, 2, way) as made:
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
        made.release_sequence(1)
        assert works(made)


@pytest.mark.parametrize("where", ["home", "holder"])
def test_an_abort_from_another_thread_ends_all_members(way: Way, where: str) -> None:
    with fleet(loaded("llama-gqa"), 2, way) as made:
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
        made.release_sequence(1)
        assert works(made)


@pytest.mark.parametrize("welcome", [True, False])
def test_an_abort_ends_a_home_that_waits_for_a_frozen_holder(way: Way, welcome: bool) -> None:
    with fleet(loaded("llama-gqa"), 2, way) as made:
        holder = BadHolder(lambda peer, ask: None, welcome, way=way)
        placement = made.place(1, ("w0", ROOM))
        placement = (replace(placement[0], worker="w9", stop=40), replace(placement[0], start=40))
        gang = replace(made.gang("w0", []), holders=(holder.endpoint,))
        home = made.members["w0"]
        batch = [state(1, placement, PROMPT, 1, 5)]
        future = home.lanes.home.submit(home.runtime.decode, DecodeWindow(gang, 0, 5, 60.0), batch)
        time.sleep(0.3)
        assert not future.done()
        home.runtime.abort(gang.number, "w9 is frozen")
        with pytest.raises(GangAbortedError, match="w9 is frozen"):
            future.result(5)
        holder.close()
        made.release_sequence(1)
        assert works(made)


def test_a_placement_without_room_is_an_error_of_ours(way: Way) -> None:
    with fleet(loaded("llama-gqa"), 1, way) as made:
        placement = made.place(1, ("w0", PROMPT + 2))
        first = made.prefill(1, placement, prompt_ids(PROMPT))
        result, _ = made.decode("w0", [state(1, placement, PROMPT, first, 9)], 9)
        assert (result.finished, len(result.tokens[1])) == ({1: "error"}, 2)
        assert isinstance(result.errors[1], PlanError)
        assert "room reserved for 72" in str(result.errors[1])
        with pytest.raises(CapacityError, match="kv-memory"):
            made.place(2, ("w0", 10**6))


@pytest.mark.parametrize("where", ["w0", "w1", "w2"])
@pytest.mark.parametrize("gone", ["first", "last"])
def test_blocks_that_are_not_there_are_an_error_that_names_their_sequence(way: Way, where: str, gone: str) -> None:
    with fleet(loaded("llama-gqa"), 3, way) as made:
        batch = []
        for sequence in (1, 2, 3):
            placement = made.place(sequence, ("w1", 24), ("w2", 24), ("w0", ROOM - 48))
            first = made.prefill(sequence, placement, prompt_ids(PROMPT))
            batch.append(state(sequence, placement, PROMPT, first, 9))
        span = next(one for one in batch[1].placement if one.worker == where)
        start = span.start if gone == "first" else span.stop - 1
        made.members[where].pool.free(2, start, start + 1)
        gang = made.gang("w0", ["w1", "w2"])
        sessions = [made.members[one].runtime.open_session(gang) for one in ("w1", "w2")]
        home = made.members["w0"]
        window = DecodeWindow(gang, 0, 5, 60.0)
        with pytest.raises(PlanError) as caught:
            home.lanes.home.submit(home.runtime.decode, window, batch).result(10)
        assert caught.value.sequence == 2
        for session in sessions:
            with pytest.raises((GangAbortedError, PlanError)):
                session.wait(10)
        made.decode("w0", [batch[0], batch[2]], 5)


def test_a_plan_that_names_a_worker_outside_of_its_gang_ends_that_sequence_alone(way: Way) -> None:
    with fleet(loaded("llama-gqa"), 3, way) as made:
        placements = [made.place(1, ("w1", 40), ("w0", ROOM)), made.place(2, ("w2", 40), ("w0", ROOM))]
        batch = []
        for sequence, placement in enumerate(placements, 1):
            first = made.prefill(sequence, placement, prompt_ids(PROMPT))
            batch.append(state(sequence, placement, PROMPT, first, NEW - 1))
        result, _ = made.decode("w0", batch, NEW, made.gang("w0", ["w1"]))
        assert (result.finished, list(result.errors)) == ({1: "length", 2: "error"}, [2])
        assert isinstance(result.errors[2], PlanError)
        assert [batch[0].last_token, *result.tokens[1]] == reference("llama-gqa").tokens


def test_holders_are_told_of_a_plan_that_fails_before_it_begins(way: Way) -> None:
    with fleet(loaded("llama-gqa"), 3, way, timeout_start=60.0) as made:
        placement = made.place(1, ("w1", 40), ("w0", PROMPT - 40))
        gang = made.gang("w0", ["w1", "w2"])
        sessions = [made.members[worker].runtime.open_session(gang) for worker in ("w1", "w2")]
        home = made.members["w0"]
        chunk = PrefillChunk(gang, 1, placement, PROMPT, (1, 2, 3))
        future = home.lanes.home.submit(home.runtime.prefill, chunk)
        with pytest.raises(PlanError, match="room reserved for 70"):
            future.result(5)
        for session in sessions:
            with pytest.raises(GangAbortedError, match="room reserved for 70"):
                session.wait(5)
        made.release_sequence(1)
        assert works(made)


def test_an_empty_batch_completes_its_gang(way: Way) -> None:
    with fleet(loaded("llama-gqa"), 2, way) as made:
        gang = made.gang("w0", ["w1"])
        result = made.run(gang, lambda runtime: runtime.decode(DecodeWindow(gang, 0, 5, 60.0), []))
        assert (result.tokens, result.steps) == ({}, 0)
        assert works(made)


def test_a_worker_without_weights_holds_but_does_not_compute(way: Way) -> None:
    with fleet(loaded("llama-gqa"), 2, way) as made:
        holder = made.members["w1"]
        holder.runtime.close()
        holder.runtime = Runtime(made.spec, None, holder.pool, holder.lanes)
        placement = made.place(1, ("w1", 40), ("w0", ROOM))
        gang = made.gang("w0", ["w1"])
        chunk = PrefillChunk(gang, 1, placement, 0, tuple(prompt_ids(PROMPT)), GREEDY)
        first = made.run(gang, lambda runtime: runtime.prefill(chunk)).token
        assert first == reference("llama-gqa").tokens[0]
        with pytest.raises(ModelError, match="no model"):
            holder.runtime.decode(DecodeWindow(gang, 0, 1, 1.0), [])


@contextmanager
def at_once(made: Fleet) -> Iterator[None]:
    began = time.monotonic()
    yield
    made.close()
    assert time.monotonic() - began < 10


def test_closing_ends_a_home_that_waits_and_a_session_that_serves(way: Way) -> None:
    made = Fleet(loaded("llama-gqa"), 2, way)
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
