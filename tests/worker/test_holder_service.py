"""Sessions and homes of an engine meet in any order, once."""

from __future__ import annotations

import time
from typing import Any

import pytest
from _examples import examples
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from distkv_dask.errors import ChannelError, ChannelTimeoutError, GangAbortedError
from distkv_dask.gang import Gang
from distkv_dask.worker.blocks.pool import BlockShape, Pool
from distkv_dask.worker.holder import service as service_module
from distkv_dask.worker.holder.service import Limits, Service
from distkv_dask.worker.holder.session import Session

LIMITS = Limits(3.0, 2.0)


def service() -> Service:
    return Service("engine", b"a token", Pool(BlockShape(2, 1, 8, "float32", 8), 8), LIMITS)


def gang(number: int) -> Gang:
    return Gang("engine", number, f"gang-{number}", 1, "w0", ())


class Meeting(RuleBasedStateMachine):
    """Sessions that open, homes that begin, ends and aborts of gangs, compared with one word for each gang."""

    def __init__(self) -> None:
        super().__init__()
        self.made = service()
        self.words: dict[int, str] = {}
        self.sessions: dict[int, Session] = {}
        self.homes: dict[int, Any] = {}
        self.waited: list[tuple[Session, bool]] = []

    numbers = st.integers(1, 3)

    @rule(number=numbers)
    def open(self, number: int) -> None:
        session, word = self.made.session(gang(number)), self.words.get(number, "new")
        home = self.made.open(session)
        if word in ("new", "early"):
            assert home is (self.homes[number] if word == "early" else None)
            self.words[number] = "running" if word == "early" else "waiting"
            self.sessions[number] = session
            return
        assert home is None
        reason = "has ended on this worker" if word == "ended" else "already has a session"
        assert reason in str(session.result.exception(0))

    @rule(number=numbers, again=st.booleans())
    def claim(self, number: int, again: bool) -> None:
        word = self.words.get(number, "new")
        home: Any = self.homes[number] if again and number in self.homes else object()
        mine = word == "early" and home is self.homes[number]
        if word in ("ended", "running") or (word == "early" and not mine):
            reason = "has ended" if word == "ended" else "by another home"
            with pytest.raises(GangAbortedError, match=reason):
                self.made.claim(number, home)
            return
        session = self.made.claim(number, home)
        assert session is (self.sessions[number] if word == "waiting" else None)
        self.homes[number] = home
        self.words[number] = "running" if word == "waiting" else "early"

    @rule(number=numbers, error=st.none() | st.just(ChannelError("w0 is gone")))
    def finish(self, number: int, error: Exception | None) -> None:
        self.made.finish(number, error)
        self._ended(number, error)

    @rule(number=numbers)
    def abort(self, number: int) -> None:
        home = self.homes[number] if self.words.get(number) in ("early", "running") else None
        assert self.made.abort(number, GangAbortedError("w9 died")) is home
        self._ended(number, GangAbortedError("w9 died"))

    def _ended(self, number: int, error: Exception | None) -> None:
        if self.words.get(number) in ("waiting", "running"):
            result = self.sessions[number].result
            assert result.done()
            assert str(result.exception()) == str(error)
        self.words[number] = "ended"

    @rule(late=st.booleans())
    def look_at_the_clock(self, late: bool) -> None:
        self.made.drop_late(time.monotonic() + (LIMITS.start + 1 if late else -1))
        for number, word in self.words.items():
            if late and word == "waiting":
                error = self.sessions[number].result.exception(0)
                assert isinstance(error, ChannelTimeoutError)
                assert f"did not begin gang gang-{number} within 3 s (distkv.timeouts.start)" in str(error)
                self.words[number] = "ended"

    @rule()
    def close(self) -> None:
        self.made.fail_all(GangAbortedError("closed"))
        for number, word in self.words.items():
            if word in ("waiting", "running"):
                self._ended(number, GangAbortedError("closed"))

    @invariant()
    def sessions_that_wait_or_run_are_open(self) -> None:
        for number, word in self.words.items():
            if word in ("waiting", "running"):
                assert not self.sessions[number].result.done()


TestMeeting = Meeting.TestCase
TestMeeting.settings = settings(max_examples=examples(80), stateful_step_count=25, deadline=None)


def test_only_the_latest_ended_gangs_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service_module, "REMEMBERED", 2)
    made = service()
    for number in (1, 2, 3, 3):
        made.finish(number, None)
    assert made.claim(1, object()) is None  # type: ignore[arg-type]
    for number in (2, 3):
        with pytest.raises(GangAbortedError, match="it is complete"):
            made.claim(number, object())  # type: ignore[arg-type]


def test_the_first_reason_of_an_end_is_the_one_that_is_told() -> None:
    made = service()
    made.finish(1, ChannelError("w0 is gone"))
    made.finish(1, None)
    with pytest.raises(GangAbortedError, match="ended on this worker: w0 is gone"):
        made.claim(1, object())  # type: ignore[arg-type]
