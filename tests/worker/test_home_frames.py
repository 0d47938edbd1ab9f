"""Every frame of a home at its holder is handled in turn, refused if it does not belong there, and in time."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytest
import torch

from distkv_dask.errors import ChannelError, ChannelTimeoutError, DistKVError, PlanError
from distkv_dask.gang import Gang
from distkv_dask.worker.blocks.pool import BlockShape, Pool
from distkv_dask.worker.channels.bodies import Hello, Row, encode_hello, encode_rows
from distkv_dask.worker.channels.frames import HEADER_BYTES, NOBODY, Header, Kind, failure_frame
from distkv_dask.worker.holder import home_connection
from distkv_dask.worker.holder.home_connection import HELLO_BYTES, HELLO_SECONDS, ROWS_BYTES, HomeConnection
from distkv_dask.worker.holder.service import Limits, Service
from distkv_dask.worker.holder.session import Session

TOKEN = b"a token of this test"
LIMITS = Limits(3.0, 2.0)


def pool() -> Pool:
    made = Pool(BlockShape(2, 1, 8, "float32", 8), 8)
    made.reserve(1, 0, 40)
    return made


def service() -> Service:
    return Service("engine", TOKEN, pool(), LIMITS)


def gang(number: int) -> Gang:
    return Gang("engine", number, f"gang-{number}", 1, "w0", ())


class Inlet:
    """A channel with given frames, which records what is sent back."""

    def __init__(self) -> None:
        self.peer, self.maximum = "10.0.0.7:4711", HELLO_BYTES
        self.data = torch.zeros(ROWS_BYTES + HEADER_BYTES, dtype=torch.uint8)
        self.frames: list[tuple[Header, bytes]] = []
        self.sent: list[tuple[Header, bytes]] = []
        self.failed: list[tuple[int, int, str, int]] = []
        self.sending = False
        self.closed = self.flushed = 0

    def receive(self) -> Header | None:
        return self.frames[0][0] if self.frames else None

    def payload(self, header: Header) -> memoryview:
        return memoryview(self.frames[0][1])

    def consume(self, header: Header) -> bool:
        self.frames.pop(0)
        return bool(self.frames)

    def make_room(self, payload: int) -> None:
        assert payload + HEADER_BYTES <= len(self.data)

    def send(self, header: Header, *buffers: Any) -> None:
        self.sent.append((header, b"".join(map(bytes, buffers))))

    def flush(self) -> None:
        self.flushed += 1
        self.sending = False

    def fail(self, gang: int, epoch: int, message: str, culprit: int = NOBODY) -> None:
        self.failed.append((gang, epoch, message, culprit))

    def close(self) -> None:
        self.closed += 1


HELLO = Hello("engine", "w0", 2, 2, 1, 8, "float32", "a=full; aa", 0)
ROW = Row(1, 16, 1, False, ((0, 16),), (20,))
ASK = Header(Kind.ATTEND, 4, 1, 0, 0, 2 * 8 * 4, 0.5)


class Home:
    """A home of a service."""

    def __init__(self, shown: bool = True) -> None:
        self.inlet, self.service = Inlet(), service()
        inlet: Any = self.inlet
        self.connection = HomeConnection(inlet, {"engine": self.service})
        if shown:
            self.says((Kind.HELLO, encode_hello(TOKEN, HELLO)))

    def says(self, *frames: tuple[Kind | Header, bytes]) -> None:
        """Frames that arrive together."""
        for kind, body in frames:
            header = kind if isinstance(kind, Header) else Header(kind, 4, 1)
            self.inlet.frames.append((header._replace(length=len(body)), body))
        self.connection.serve()

    def begins(self) -> Session:
        session = self.service.session(gang(4))
        self.service.open(session)
        self.says((Kind.BEGIN, encode_rows([ROW])))
        return session

    @property
    def answers(self) -> list[Kind]:
        return [header.kind for header, _ in self.inlet.sent]


def test_a_home_is_served_from_hello_to_end() -> None:
    home = Home()
    session = home.begins()
    for step in range(2):
        for layer in range(2):
            home.says((ASK._replace(layer=layer, step=step), bytes(64)))
    home.says((Kind.END, b""))
    stats = session.wait(0)
    assert (stats.requests, stats.bytes_in, stats.bytes_out) == (4, 4 * 64, 4 * 2 * 9 * 4)
    assert home.answers == [Kind.WELCOME, Kind.READY, *[Kind.PARTIAL] * 4]
    assert (home.connection.host, home.inlet.peer) == ("10.0.0.7", "w0")
    assert home.inlet.maximum >= ROWS_BYTES


def test_frames_that_come_together_are_handled_in_turn_until_an_answer_is_stuck() -> None:
    home = Home()
    home.begins()
    home.inlet.sending = True
    home.says((ASK, bytes(64)), (ASK._replace(layer=1), bytes(64)))
    assert home.inlet.flushed == 1
    assert home.answers.count(Kind.PARTIAL) == 2

    def stick(header: Header, *buffers: Any) -> None:
        Inlet.send(home.inlet, header, *buffers)
        home.inlet.sending = True

    home.inlet.send = stick  # type: ignore[method-assign]
    home.says((ASK._replace(step=1), bytes(64)), (ASK._replace(layer=1, step=1), bytes(64)))
    assert home.answers.count(Kind.PARTIAL) == 3
    assert len(home.inlet.frames) == 1, "its buffer is in use until the answer has left"


STRANGERS: dict[str, tuple[Kind, bytes, str]] = {
    "no hello": (Kind.BEGIN, encode_hello(TOKEN, HELLO), "shows no token"),
    "another token": (Kind.HELLO, encode_hello(b"another", HELLO), "shows no token"),
    "too short": (Kind.HELLO, b"", "shows no token"),
    "no body": (Kind.HELLO, encode_hello(TOKEN, HELLO)[:32], "not msgpack"),
}


@pytest.mark.parametrize("what", STRANGERS)
def test_strangers_hear_nothing(what: str) -> None:
    kind, body, words = STRANGERS[what]
    home = Home(shown=False)
    with pytest.raises(ChannelError, match=words) as caught:
        home.says((kind, body))
    home.connection.leave(caught.value)
    assert (home.inlet.sent, home.inlet.failed, home.inlet.closed) == ([], [], 1)


@pytest.mark.parametrize(
    "change",
    [
        {"engine": "another"}, {"layers": 3}, {"kv_heads": 2}, {"head_dim": 16}, {"dtype": "bfloat16"},
        {"layer_kinds": "a=sliding 5; aa"}, {"latent_dim": 4},
    ],
    ids=lambda one: next(iter(one)),
)  # fmt: skip
def test_a_home_with_another_model_is_told_both_models(change: dict[str, Any]) -> None:
    home = Home(shown=False)
    with pytest.raises(ChannelError, match="home w0 speaks of engine") as caught:
        home.says((Kind.HELLO, encode_hello(TOKEN, HELLO._replace(**change))))
    home.connection.leave(caught.value)
    ((_, _, words, culprit),) = home.inlet.failed
    assert culprit == NOBODY
    assert str(next(iter(change.values()))) in words
    assert home.inlet.sent == []


REFUSED: dict[str, tuple[bool, Header, bytes, str]] = {
    "a question before its gang": (False, ASK, bytes(64), "this holder is in gang, epoch None"),
    "a batch before its gang": (False, Header(Kind.BATCH, 4, 1), encode_rows([ROW]), "gang, epoch None"),
    "an end before its gang": (False, Header(Kind.END, 4, 1), b"", "gang, epoch None"),
    "a second begin": (True, Header(Kind.BEGIN, 4, 1), encode_rows([ROW]), "which no home sends"),
    "an answer": (True, Header(Kind.PARTIAL, 4, 1), b"", "which no home sends"),
    "a second hello": (True, Header(Kind.HELLO, 4, 1), encode_hello(TOKEN, HELLO), "which no home sends"),
    "an end of another gang": (True, Header(Kind.END, 5, 1), b"", r"in gang, epoch \(4, 1\)"),
    "an end of another epoch": (True, Header(Kind.END, 4, 2), b"", r"in gang, epoch \(4, 1\)"),
    "a question of another gang": (True, ASK._replace(gang=5), bytes(64), "expected ATTEND of gang 4"),
    "another epoch": (True, ASK._replace(epoch=2), bytes(64), "expected ATTEND of gang 4, epoch 1"),
    "another layer": (True, ASK._replace(layer=1), bytes(64), "step 0, layer 0"),
    "another step": (True, ASK._replace(step=1), bytes(64), "step 0, layer 0"),
    "another length": (True, ASK, bytes(60), "64 bytes"),
    "rows that are none": (True, Header(Kind.BATCH, 4, 1), b"\xc1", "not msgpack"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_frame_where_it_does_not_belong_ends_the_home(what: str) -> None:
    begun, header, body, words = REFUSED[what]
    home = Home()
    session = home.begins() if begun else None
    before = len(home.inlet.sent)
    with pytest.raises(ChannelError, match=words) as caught:
        home.says((header, body))
    assert len(home.inlet.sent) == before
    home.connection.leave(caught.value)
    assert home.inlet.failed == [(*((4, 1) if begun else (0, 0)), str(caught.value), NOBODY)]
    if session is not None:
        assert session.result.exception(0) is caught.value


def test_a_plan_that_does_not_fit_names_its_sequence() -> None:
    home = Home()
    session = home.service.session(gang(4))
    home.service.open(session)
    with pytest.raises(PlanError) as caught:
        home.says((Kind.BEGIN, encode_rows([ROW._replace(sequence=7)])))
    home.connection.leave(caught.value)
    assert home.inlet.failed[0][3] == 7
    assert session.result.exception(0) is caught.value


def test_another_epoch_of_the_plan_is_refused_with_both() -> None:
    home = Home()
    session = home.service.session(replace(gang(4), epoch=2))
    home.service.open(session)
    with pytest.raises(ChannelError, match="begins gang 4 in epoch 1; this holder's plan is of epoch 2"):
        home.says((Kind.BEGIN, encode_rows([ROW])))


@pytest.mark.parametrize("begun", [False, True])
def test_a_home_that_failed_ends_the_gang_it_names(begun: bool) -> None:
    home = Home()
    session = home.begins() if begun else home.service.session(gang(4))
    if not begun:
        home.service.open(session)
    _, body = failure_frame(4, 1, "its model is broken", 7)
    with pytest.raises(PlanError, match="home w0 failed: its model is broken"):
        home.says((Header(Kind.FAIL, 4, 1), body))
    assert "its model is broken" in str(session.result.exception(0))


# Time limits


@pytest.mark.parametrize(
    ("stage", "seconds", "words"),
    [
        ("stranger", HELLO_SECONDS, "showed no token within 5 s"),
        ("early", LIMITS.start, r"session was not opened within 3 s \(distkv.timeouts.start\)"),
        ("begun", LIMITS.start + 2 * LIMITS.receive, "w0 was silent for too long in gang gang-4"),
        ("asked", 2 * LIMITS.receive, "w0 was silent for too long in gang gang-4"),
    ],
)
def test_a_home_has_a_time_for_each_of_its_stages(
    stage: str, seconds: float, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(home_connection.time, "monotonic", lambda: 100.0)  # type: ignore[attr-defined]
    home = Home(shown=stage != "stranger")
    if stage == "early":
        home.says((Kind.BEGIN, encode_rows([ROW])))
    elif stage in ("begun", "asked"):
        home.begins()
    if stage == "asked":
        home.says((ASK, bytes(64)))
    home.connection.check_clock(100.0 + seconds)
    with pytest.raises(ChannelTimeoutError, match=words):
        home.connection.check_clock(100.1 + seconds)


@pytest.mark.parametrize("ended", [False, True])
def test_a_home_between_gangs_may_be_silent_for_ever(ended: bool) -> None:
    home = Home()
    if ended:
        home.begins()
        home.says((Kind.END, b""))
    home.connection.check_clock(time.monotonic() + 1e9)


def test_what_is_no_error_of_ours_leaves_too() -> None:
    home = Home()
    session = home.begins()
    home.connection.leave(ValueError("odd"))
    assert home.inlet.failed == [(4, 1, "odd", NOBODY)]
    assert isinstance(session.result.exception(0), ValueError)
    assert not isinstance(session.result.exception(0), DistKVError)
