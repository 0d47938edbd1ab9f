"""The home lane works in order, with low priority; the holder lane answers every home, and none waits for another."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError

import pytest
import torch
from _channels import send_bare
from _peers import HEAD_DIM, HEADS, KV_HEADS, Holder, answer, ask, begin, connect, gang, impatient, serves

from distkv_dask.errors import (
    ChannelError,
    ChannelTimeoutError,
    EngineClosedError,
    GangAbortedError,
)
from distkv_dask.kernels import micro_attention
from distkv_dask.worker.blocks.pool import Pool
from distkv_dask.worker.channels.base import Channel
from distkv_dask.worker.channels.bodies import Row, encode_rows
from distkv_dask.worker.channels.frames import Header, Kind
from distkv_dask.worker.home.lane import NICENESS, HomeLane


@pytest.fixture
def home_lane() -> Iterator[HomeLane]:
    lane = HomeLane(1)
    yield lane
    lane.close()


def test_work_of_a_home_runs_in_the_order_it_was_submitted(home_lane: HomeLane) -> None:
    seen: list[int] = []
    for future in [home_lane.submit(seen.append, at) for at in range(50)]:
        future.result(5)
    assert seen == list(range(50))


def test_who_waits_for_the_present_call_only_does_not_wait_for_those_behind_it(home_lane: HomeLane) -> None:
    seen: list[str] = []
    release = threading.Event()
    calls = [home_lane.submit(release.wait, 5), home_lane.submit(seen.append, "a window in the queue")]
    calls.append(home_lane.submit_next(seen.append, "the end of the present one"))
    release.set()
    for call in calls:
        call.result(5)
    assert seen == ["the end of the present one", "a window in the queue"]


def test_an_error_of_one_call_reaches_its_caller_and_nobody_else(home_lane: HomeLane) -> None:
    failing = home_lane.submit(lambda: 1 // 0)
    assert home_lane.submit(lambda: 5).result(5) == 5
    with pytest.raises(ZeroDivisionError):
        failing.result(5)


@pytest.mark.skipif(sys.platform != "linux", reason="thread priorities are Linux's")
def test_a_prefilling_home_steps_back_behind_the_holder_lane(home_lane: HomeLane) -> None:
    before = os.getpriority(os.PRIO_PROCESS, 0)
    here = home_lane.submit(lambda: os.getpriority(os.PRIO_PROCESS, threading.get_native_id())).result(5)
    assert here == min(NICENESS, 19)
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == before


def test_closing_a_home_lane_cancels_what_has_not_begun() -> None:
    lane = HomeLane(1)
    started, release = threading.Event(), threading.Event()
    lane.submit(lambda: (started.set(), release.wait(5)))
    later = lane.submit(lambda: 1)
    started.wait(5)
    with pytest.raises(TimeoutError, match="still at work"):
        lane.close(0.05)
    release.set()
    lane.close()
    with pytest.raises(CancelledError):
        later.result(5)
    with pytest.raises(EngineClosedError):
        lane.submit(lambda: 1)


def test_a_holder_answers_with_attention_over_its_span(lane: Holder, home: Channel, pool: Pool) -> None:
    session = lane.open_session("engine", gang())
    begin(home)
    home.recv_into(Header(Kind.READY, 1, 1))
    table = torch.tensor([pool.table(1)], dtype=torch.int32)
    for step in range(3):
        for layer in range(2):
            q, out, lse = ask(home, layer=layer, step=step)
            length = torch.tensor([30], dtype=torch.int32)
            right = micro_attention(q, pool.keys(layer), pool.values(layer), table, length, scale=0.125)
            assert torch.allclose(out, right[0], atol=1e-6)
            assert torch.allclose(lse, right[1], atol=1e-6)
    home.send(Header(Kind.END, 1, 1))
    stats = session.wait(5)
    assert (stats.requests, stats.bytes_in) == (6, 6 * HEADS * HEAD_DIM * 4)
    assert stats.bytes_out == 6 * HEADS * (HEAD_DIM + 1) * 4
    assert stats.busy_seconds > 0


def test_one_channel_serves_many_gangs_and_changing_batches(lane: Holder, home: Channel) -> None:
    for number in range(1, 6):
        session = lane.open_session("engine", gang(number))
        begin(home, number, rows=())
        home.recv_into(Header(Kind.READY, number, 1))
        body = encode_rows([Row(1, number, 1, True, ((0, 40),), (number,))])
        home.send(Header(Kind.BATCH, number, 1, step=7, length=len(body)), body)
        size = (HEADS + 2 * KV_HEADS) * HEAD_DIM * 4
        for layer in range(2):
            home.send(Header(Kind.ATTEND, number, 1, layer, 7, size, 0.125), bytes(size))
            answer(home, number, 1, layer, 7)
        home.send(Header(Kind.END, number, 1))
        assert session.wait(5).requests == 2


def test_a_home_that_comes_before_the_session_waits_for_it(lane: Holder, home: Channel) -> None:
    begin(home)
    time.sleep(0.1)
    session = lane.open_session("engine", gang())
    home.recv_into(Header(Kind.READY, 1, 1))
    home.send(Header(Kind.END, 1, 1))
    assert session.wait(5).requests == 0


@impatient
def test_half_a_frame_of_one_home_does_not_keep_others_waiting(lane: Holder, home: Channel) -> None:
    session = lane.open_session("engine", gang())
    begin(home)
    home.recv_into(Header(Kind.READY, 1, 1))
    send_bare(home, Header(Kind.ATTEND, 1, 1, 0, 0, HEADS * HEAD_DIM * 4, 0.125).pack() + b"half")
    assert serves(lane, 2)
    with pytest.raises(ChannelTimeoutError, match=r"silent for too long"):
        session.wait(5)


@impatient
def test_a_home_that_does_not_read_its_answers_keeps_nobody_waiting(lane: Holder, pool: Pool) -> None:
    home = connect(lane)
    if hasattr(home, "_sock"):
        home._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    session = lane.open_session("engine", gang())
    rows, queries = (Row(1, 30, 20_000, False, ((0, 40),), (30,)),), 20_000
    begin(home, rows=rows)
    home.recv_into(Header(Kind.READY, 1, 1))
    q = torch.zeros(queries, HEADS, HEAD_DIM)
    home.send(Header(Kind.ATTEND, 1, 1, 0, 0, q.nbytes, 0.125), q.numpy())
    assert serves(lane, 2)
    with pytest.raises(ChannelTimeoutError):
        session.wait(5)
    home.close()


@pytest.mark.parametrize("begun", [False, True])
def test_a_dying_home_ends_its_session_at_once(lane: Holder, home: Channel, begun: bool) -> None:
    if begun:
        session = lane.open_session("engine", gang())
    begin(home)
    if begun:
        home.recv_into(Header(Kind.READY, 1, 1))
    home.close()
    if not begun:
        time.sleep(0.1)
        session = lane.open_session("engine", gang())
    with pytest.raises((ChannelError, GangAbortedError), match="w0 closed the channel"):
        session.wait(5)


@pytest.mark.parametrize("begun", [False, True])
def test_a_failing_home_ends_its_session_with_its_reason(lane: Holder, home: Channel, begun: bool) -> None:
    session = lane.open_session("engine", gang())
    if begun:
        begin(home)
        home.recv_into(Header(Kind.READY, 1, 1))
    home.fail(1, 1, "its model is broken")
    with pytest.raises(GangAbortedError, match="home w0 failed: its model is broken"):
        session.wait(5)


@impatient
def test_a_home_that_never_comes_ends_the_session_in_time(lane: Holder) -> None:
    session = lane.open_session("engine", gang())
    with pytest.raises(ChannelTimeoutError, match=r"did not end in 0.01 s"):
        session.wait(0.01)
    with pytest.raises(ChannelTimeoutError, match=r"did not begin gang gang-1 within 0.5 s \(distkv.timeouts.start\)"):
        session.wait(5)


@impatient
def test_a_session_that_is_never_opened_sends_its_home_away(lane: Holder, home: Channel) -> None:
    begin(home)
    with pytest.raises(GangAbortedError, match=r"not opened within 0.5 s \(distkv.timeouts.start\)"):
        home.recv_into(Header(Kind.READY, 1, 1))


@pytest.mark.parametrize("begun", [False, True])
def test_an_abort_ends_session_and_home(lane: Holder, home: Channel, begun: bool) -> None:
    session = lane.open_session("engine", gang())
    begin(home)
    if begun:
        home.recv_into(Header(Kind.READY, 1, 1))
    lane.abort("engine", 1, "w7 died")
    with pytest.raises(GangAbortedError, match="w7 died"):
        session.wait(5)
    if not begun:  # READY may still be on its way
        with contextlib.suppress(GangAbortedError):
            home.recv_into(Header(Kind.READY, 1, 1))
    with pytest.raises((GangAbortedError, ChannelError), match=r"w7 died|closed"):
        home.recv_into(Header(Kind.READY, 1, 1))


def test_an_abort_that_comes_first_refuses_session_and_home(lane: Holder, home: Channel) -> None:
    lane.abort("engine", 1, "w7 died")
    begin(home)
    with pytest.raises(GangAbortedError, match="w7 died"):
        home.recv_into(Header(Kind.READY, 1, 1))
    with pytest.raises(GangAbortedError, match="w7 died"):
        lane.open_session("engine", gang()).wait(5)


@pytest.mark.parametrize("close", [lambda lane: lane.detach("engine"), lambda lane: lane.close()])
def test_closing_ends_sessions_and_homes(lane: Holder, home: Channel, close) -> None:
    waiting, running = lane.open_session("engine", gang(1)), lane.open_session("engine", gang(2))
    begin(home, 2)
    home.recv_into(Header(Kind.READY, 2, 1))
    close(lane)
    close(lane)
    for session in (waiting, running):
        with pytest.raises(GangAbortedError, match="closed"):
            session.wait(5)
    with pytest.raises(GangAbortedError, match=r"w1 failed: .* was closed"):
        home.recv_into(Header(Kind.PARTIAL, 2, 1))
    with pytest.raises(EngineClosedError):
        lane.open_session("engine", gang(4))
