"""A gang at its home, over channels that are lists: what each holder is told, in which order, for all kinds of ends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from distkv_dask.errors import ChannelError, ChannelTimeoutError, GangAbortedError, PlanError
from distkv_dask.gang import Gang
from distkv_dask.placement import Endpoint
from distkv_dask.worker.channels.bodies import Row, decode_rows, encode_rows
from distkv_dask.worker.channels.frames import Header, Kind
from distkv_dask.worker.home import gang as gang_module
from distkv_dask.worker.home.gang import NOTHING, ChannelCache, HomeGang
from distkv_dask.worker.plan import Part

HOLDERS = tuple(Endpoint(f"w{at}", "host", at) for at in (1, 2, 3))
GANG = Gang("engine", 7, "gang-7", 3, "w0", HOLDERS)
HELLO = b"a hello"
ROW = Row(5, 16, 1, False, ((0, 16),), (20,))
PARTS = {"w0": Part((ROW,), (0,)), "w1": Part((ROW,), (0,)), "w3": Part((ROW, ROW), (0, 0))}


class Wire:
    """A channel that records its frames; ``faults`` are raised when a kind of frame is sent or awaited."""

    def __init__(self, peer: str, log: list[tuple[str, str]]) -> None:
        self.peer, self._log = peer, log
        self.sent: list[tuple[Header, bytes]] = []
        self.limits: list[float] = []
        self.failed: list[tuple[int, int, str]] = []
        self.faults: dict[Kind, Exception] = {}
        self.closed = self.aborted = 0
        self.is_idle = True

    def limit(self, seconds: float) -> None:
        self.limits.append(seconds)

    def send(self, header: Header, *buffers: Any) -> None:
        self._meet(header.kind)
        self.sent.append((header, b"".join(map(bytes, buffers))))

    def recv_into(self, expected: Header, buffer: Any = None) -> None:
        assert buffer is None
        self._meet(expected.kind)

    def _meet(self, kind: Kind) -> None:
        self._log.append((self.peer, kind.name))
        if kind in self.faults:
            raise self.faults[kind]

    def fail(self, gang: int, epoch: int, message: str) -> None:
        self.failed.append((gang, epoch, message))
        self.close()

    def abort(self) -> None:
        self.aborted += 1

    def close(self) -> None:
        self.closed += 1

    def idle(self) -> bool:
        return self.is_idle


class Network:
    """Channels to holders, in the order in which they were opened."""

    def __init__(self) -> None:
        self.log: list[tuple[str, str]] = []
        self.wires: dict[str, list[Wire]] = {}
        self.waits: list[float] = []
        self.prepare: Callable[[Wire], None] = lambda wire: None
        self.cache = ChannelCache(self._connect, HELLO)  # type: ignore[arg-type]

    def _connect(self, endpoint: Endpoint, seconds: float) -> Wire:
        self.waits.append(seconds)
        wire = Wire(endpoint.worker, self.log)
        self.wires.setdefault(endpoint.worker, []).append(wire)
        self.prepare(wire)
        return wire

    def gang(self) -> HomeGang:
        return HomeGang(GANG, self.cache, 5.0, 2.0)

    def last(self, worker: str) -> Wire:
        return self.wires[worker][-1]


@pytest.fixture
def network() -> Network:
    return Network()


def run(network: Network, *steps: Callable[[HomeGang], object]) -> None:
    """A gang in which these steps are taken."""
    with network.gang() as gang:
        for step in steps:
            step(gang)


def begin(gang: HomeGang) -> None:
    gang.open_sessions(PARTS)


def fault(error: Exception) -> Callable[[HomeGang], None]:
    def step(_: HomeGang) -> None:
        raise error

    return step


def frames(wire: Wire) -> list[str]:
    return [header.kind.name for header, _ in wire.sent]


def test_holders_begin_with_their_rows_and_are_let_go_at_the_end(network: Network) -> None:
    with network.gang() as gang:
        gang.open_sessions(PARTS)
        assert gang.channels.keys() == {"w1", "w2", "w3"}
    for worker in ("w1", "w2", "w3"):
        wire = network.last(worker)
        assert frames(wire) == ["HELLO", "BEGIN", "END"]
        assert wire.sent[0] == (Header(Kind.HELLO, length=len(HELLO)), HELLO)
        header, body = wire.sent[1]
        assert header == Header(Kind.BEGIN, 7, 3, length=len(body))
        assert decode_rows(body) == list(PARTS.get(worker, NOTHING).rows)
        assert wire.sent[2] == (Header(Kind.END, 7, 3), b"")
        assert (wire.closed, wire.failed) == (0, [])


def test_all_begin_before_any_is_waited_for(network: Network) -> None:
    with network.gang() as gang:
        gang.open_sessions(PARTS)
        kinds = [kind for _, kind in network.log]
    assert kinds.index("READY") > max(at for at, kind in enumerate(kinds) if kind == "BEGIN")


def test_the_time_to_begin_is_one_for_all_and_silence_is_counted_afterwards(
    network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([100.0, 101.0, 104.0, 109.0])
    monkeypatch.setattr(gang_module.time, "monotonic", lambda: next(clock))  # type: ignore[attr-defined]
    with network.gang() as gang:
        gang.open_sessions(PARTS)
        limits = [wire.limits for wire in (gang.channels[worker] for worker in gang.channels)]  # type: ignore[attr-defined]
    assert limits == [[5.0, 4.0, 2.0], [5.0, 1.0, 2.0], [5.0, 0.001, 2.0]]
    assert network.waits == [2.0] * 3


def test_channels_are_kept_for_the_next_gang_and_greeted_once(network: Network) -> None:
    for _ in range(3):
        with network.gang() as gang:
            gang.open_sessions(PARTS)
    assert {worker: len(wires) for worker, wires in network.wires.items()} == {"w1": 1, "w2": 1, "w3": 1}
    assert frames(network.last("w1")) == ["HELLO", *["BEGIN", "END"] * 3]


def test_a_channel_that_broke_meanwhile_is_replaced(network: Network) -> None:
    with network.gang() as gang:
        gang.open_sessions(PARTS)
    network.last("w2").is_idle = False
    with network.gang() as gang:
        gang.open_sessions(PARTS)
    old, new = network.wires["w2"]
    assert (old.closed, new.closed) == (1, 0)
    assert frames(new) == ["HELLO", "BEGIN", "END"]


def test_closing_the_cache_closes_what_is_kept_once(network: Network) -> None:
    with network.gang() as gang:
        gang.open_sessions(PARTS)
    network.cache.close()
    network.cache.close()
    assert [network.last(worker).closed for worker in ("w1", "w2", "w3")] == [1, 1, 1]


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ({"w1"}, {"w1"}, {"w1"}),
        ({"w1"}, {"w2"}, {"w1", "w2"}),
        ({"w1", "w3"}, set(), {"w1", "w3"}),
        (set(), {"w3"}, {"w3"}),
        (set(), set(), set()),
    ],
)
def test_a_new_batch_is_told_to_those_that_had_or_have_a_part(
    network: Network, old: set[str], new: set[str], told: set[str]
) -> None:
    part = Part((ROW,), (0,))
    with network.gang() as gang:
        gang.open_sessions(PARTS)
        gang.change(9, dict.fromkeys(old, part), dict.fromkeys(new, part))
    for worker in ("w1", "w2", "w3"):
        batches = [one for one in network.last(worker).sent if one[0].kind is Kind.BATCH]
        assert len(batches) == (worker in told)
        for header, body in batches:
            assert body == encode_rows(part.rows if worker in new else ())
            assert header == Header(Kind.BATCH, 7, 3, step=9, length=len(body))


# Ends


def test_a_fault_at_home_is_told_to_all_and_no_channel_is_kept(network: Network) -> None:
    with pytest.raises(ValueError, match="odd"):
        run(network, begin, fault(ValueError("odd")))
    for worker in ("w1", "w2", "w3"):
        assert network.last(worker).failed == [(7, 3, "ValueError: odd")]
        assert "END" not in frames(network.last(worker))
    network.cache.close()
    assert [network.last(worker).closed for worker in ("w1", "w2", "w3")] == [1, 1, 1]


def test_holders_that_were_not_asked_yet_are_told_too(network: Network) -> None:
    """Otherwise their tasks would wait for a home that never comes."""
    with pytest.raises(PlanError):
        run(network, fault(PlanError("a fault of the plan", 5)))
    for worker in ("w1", "w2", "w3"):
        wire = network.last(worker)
        assert frames(wire) == ["HELLO"]
        assert wire.failed == [(7, 3, "a fault of the plan")]
    assert network.waits == [gang_module.TELL_SECONDS] * 3


def test_who_cannot_be_told_keeps_nobody_from_hearing(network: Network) -> None:
    def prepare(wire: Wire) -> None:
        if wire.peer == "w2":
            raise ChannelError("cannot be reached")
        if wire.peer == "w1":
            wire.faults[Kind.WELCOME] = ChannelTimeoutError("silent")

    network.prepare = prepare
    with pytest.raises(ValueError, match="odd"):
        run(network, fault(ValueError("odd")))
    assert len(network.last("w3").failed) == 1
    assert network.last("w1").closed == 1, "a channel that was opened only for this is closed in any case"


@pytest.mark.parametrize("kind", [Kind.WELCOME, Kind.BEGIN])
def test_a_holder_that_fails_as_the_gang_begins_fails_it_for_all(network: Network, kind: Kind) -> None:
    def prepare(wire: Wire) -> None:
        if wire.peer == "w2":
            wire.faults[kind] = ChannelError("w2 is gone")

    network.prepare = prepare
    with pytest.raises(ChannelError, match="w2 is gone"):
        run(network, begin)
    assert [len(network.last(worker).failed) for worker in ("w1", "w2", "w3")] == [1, 1, 1]


def test_a_holder_that_does_not_join_in_time_is_named_with_the_setting(network: Network) -> None:
    def prepare(wire: Wire) -> None:
        if wire.peer == "w2":
            wire.faults[Kind.READY] = ChannelTimeoutError("silent")

    network.prepare = prepare
    words = r"w2 did not join gang gang-7 within 5 s \(distkv.timeouts.start\)"
    with pytest.raises(ChannelTimeoutError, match=words):
        run(network, begin)


def test_a_gang_that_is_complete_does_not_fail_for_a_holder_that_left(network: Network) -> None:
    with network.gang() as gang:
        gang.open_sessions(PARTS)
        network.last("w1").faults[Kind.END] = ChannelError("w1 closed the channel")
        network.last("w2").faults[Kind.END] = BrokenPipeError()
    assert frames(network.last("w3"))[-1] == "END"


def test_an_abort_ends_what_blocks_and_is_the_reason_that_all_hear(network: Network) -> None:
    closed = fault(ChannelError("w1 closed the channel"))  # the error of a call whose channel was aborted
    with pytest.raises(GangAbortedError, match="gang gang-7 was aborted: w9 died") as caught:
        run(network, begin, lambda gang: gang.abort("w9 died"), closed)
    assert [network.last(worker).aborted for worker in ("w1", "w2", "w3")] == [1, 1, 1]
    assert isinstance(caught.value.__cause__, ChannelError)
    assert network.last("w1").failed == [(7, 3, "w9 died")]


def test_an_abort_before_channels_are_open_opens_no_more(network: Network) -> None:
    with pytest.raises(GangAbortedError, match="w9 died"):
        run(network, lambda gang: gang.abort("w9 died"), HomeGang.check)

    def abort_on_connect(gang: HomeGang) -> None:
        network.prepare = lambda wire: gang.abort("w9 died")

    with pytest.raises(GangAbortedError, match="w9 died"):
        run(network, abort_on_connect, begin)
    assert all("BEGIN" not in frames(wire) for wires in network.wires.values() for wire in wires)
