"""The effect of each message of a worker on an engine, and how each command reaches workers, Dask and clients."""

from __future__ import annotations

import asyncio
from array import array
from functools import partial
from typing import Any

import pytest
from _by_hand import ENGINE, DaskByHand, Tasks, open_engine, open_on, opened, say, until
from distributed.core import Status

from distkv_dask.errors import ClusterError, DistKVError, EngineClosedError, GangAbortedError
from distkv_dask.gang import Exchanged, WindowResult
from distkv_dask.messages import from_worker as did
from distkv_dask.messages import to_worker as to
from distkv_dask.messages.client_calls import Delivery, Generate
from distkv_dask.messages.names import unpack
from distkv_dask.sampling import SamplingParams
from distkv_dask.scheduler import clock, dispatch
from distkv_dask.scheduler import commands as do
from distkv_dask.scheduler.enact import enact
from distkv_dask.scheduler.engines.engine import EngineState
from distkv_dask.scheduler.engines.opening import MAX_REOPENINGS
from distkv_dask.scheduler.gmanager import GManager
from distkv_dask.scheduler.lifecycle.events import Tick

NOTHING = Exchanged(0.0, 0.0, 0, 0)


def ask(manager: GManager, number: int = 1, tokens: int = 6, new: int = 12) -> None:
    """A request that one chunk of a prompt prefills."""
    prompt, sampling = array("i", range(tokens)), SamplingParams(max_new_tokens=new, ignore_eos=True)
    assert unpack(manager.submit(ENGINE, (Generate(number, prompt, sampling),))) == {}


def submitted(tasks: Tasks) -> list[tuple[Any, ...]]:
    return [one for one in tasks.asked if one[0] == "submit"]


async def decoding(dask: DaskByHand, **settings: Any) -> tuple[GManager, EngineState, Tasks, str, int]:
    """A request whose first window is submitted: its home, and the number of the window's gang."""
    manager, state, tasks = await open_on(dask, **settings)
    ask(manager)
    ((*_, (gang,), _, _),) = submitted(tasks)
    home = state.life.ledger.sequences[1].home
    say(manager, did.ChunkStarted(home, gang), did.Prefilled(home, 1, gang, 7, None, NOTHING))
    *_, (window,), _, _ = submitted(tasks)[-1]
    assert window != gang
    return manager, state, tasks, home, window


def test_a_request_goes_through_dask_to_its_worker_and_back_to_its_client() -> None:
    async def run() -> None:
        dask = DaskByHand("a")
        manager, state, tasks, home, window = await decoding(dask)
        assert home == "a"
        assert dask.to("a") == ["Open", "Reserve", "Join"], "blocks are reserved before the chunk, which is a task"
        chain = state.life.chains[home]
        (number,) = [number for number, one in chain.outstanding.items() if one.window.gang.number == window]
        result = WindowResult({1: [8, 9]}, {1: "stop"}, 2, 0.1)
        say(manager, did.WindowStarted(home, number), did.WindowDone(home, number, chain.epoch, result, ()))
        assert ("hurry", "a") in tasks.asked
        heard = await state.take_events(0, 0, 0.0)
        assert [one.tokens for one in heard if one.tokens] == [(7,), (8, 9)]
        assert heard[-1].reason == "stop"
        assert state.figures.totals["prefilled_tokens"] == 6
        assert state.figures.totals["generated_tokens"] == 3
        assert state.figures.totals["decode_steps"] == 2

    asyncio.run(run())


def test_what_nobody_knows_is_not_heard() -> None:
    async def run() -> None:
        dask = DaskByHand("a")
        manager, state, tasks = await open_on(dask)
        ask(manager)
        before = len(tasks.asked), len(dask.sent)
        say(manager, did.Lost("stranger", "x"), did.GangFailed("stranger", 1, GangAbortedError("x")))
        say(manager, did.Lost("a", "x"), engine="another engine")
        assert (len(tasks.asked), len(dask.sent)) == before
        assert "a" in state.facts

    asyncio.run(run())


def test_a_worker_that_loses_an_engine_opens_it_again_a_few_times() -> None:
    async def run() -> None:
        dask = DaskByHand("a", "b")
        manager, state, tasks = await open_on(dask)
        for time in range(MAX_REOPENINGS + 1):
            assert dask.to("a").count("Open") == time + 1
            say(manager, did.Lost("a", "its lane ended"))
            assert "a" not in state.life.ledger.workers
            assert ("lost", "a", ENGINE) in tasks.asked, "of other engines' tasks nothing is known"
            if time < MAX_REOPENINGS:
                say(manager, opened("a"))
                assert "a" in state.life.ledger.workers
        assert dask.to("a").count("Open") == MAX_REOPENINGS + 1, "it does not go on for ever"
        assert not state.knows("a")
        assert any("its lane ended" in event.text for event in state.figures.events)
        assert "b" in state.life.ledger.workers

    asyncio.run(run())


@pytest.mark.parametrize("how", ["dies", "closes", "refuses the gang"])
def test_a_request_whose_worker_is_gone_goes_on_elsewhere(how: str) -> None:
    async def run() -> None:
        dask = DaskByHand("a", "b")
        manager, state, tasks, home, window = await decoding(dask)
        (other,) = {"a", "b"} - {home}
        count = len(submitted(tasks))
        match how:
            case "dies":
                dask.leave(home)
                manager.remove_worker(dask, home)  # type: ignore[arg-type]
                assert ("lost", home, None) in tasks.asked
                assert home not in manager.dispatcher.versions
            case "closes":
                say(manager, did.Closed(home))
            case _:
                say(manager, did.GangFailed(home, window, EngineClosedError("closed")))
        assert home not in state.facts
        assert len(submitted(tasks)) > count
        assert state.life.ledger.sequences[1].home == other

    asyncio.run(run())


def test_a_gang_that_fails_is_told_to_dask_and_tried_again() -> None:
    async def run() -> None:
        dask = DaskByHand("a")
        manager, state, _, _, window = await decoding(dask)
        say(manager, did.GangFailed("a", window, DistKVError("ValueError on a: 'secret prompt'")))
        (event,) = [one for one in dask.logged if one["action"] == "gang-failed"]
        assert (event["engine"], event["gang"]) == (ENGINE, window)
        assert "secret" not in event["error"], "errors may quote prompts"
        assert "a" in state.facts
        manager.dispatcher._task_failed("engine that is closed", 1, GangAbortedError("x"))
        manager.dispatcher._task_failed(ENGINE, 10**9, GangAbortedError("cancelled by somebody"))
        assert state.broken is None

    asyncio.run(run())


def test_a_fault_of_the_state_machine_ends_its_engine_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        dask = DaskByHand("a")
        manager, state, tasks, *_ = await decoding(dask, timeout_close=0.01)
        await open_engine(manager, opened("a"), engine="other")
        monkeypatch.setattr(state.machine, "handle", lambda event, now: 1 // 0)
        assert manager.dispatcher.handle(state, Tick()) == []
        assert manager.dispatcher.handle(state, Tick()) == [], "it is not asked again"
        heard = await state.take_events(0, 0, 0.0)
        assert isinstance(heard[-1].error, EngineClosedError)
        assert "see the scheduler's log: ZeroDivisionError" in str(heard[-1].error)
        with pytest.raises(EngineClosedError, match="broken"):
            manager.submit(ENGINE, ())
        await until(lambda: ("cancel", ENGINE) in tasks.asked)
        assert ("drained", ENGINE) not in tasks.asked, "nobody ends its tasks"
        say(manager, did.Closed("a"))
        await until(lambda: [*manager.engines] == ["other"])
        assert ("close",) not in tasks.asked

    asyncio.run(run())


def test_an_engine_is_closed_on_every_worker_even_on_those_that_open_it_just_now() -> None:
    async def run() -> None:
        dask = DaskByHand("a")
        manager, _, tasks = await open_on(dask)
        dask.join("b")
        manager.worker_event("b", "0.0.1")  # of another version: never asked
        dask.join("c")
        manager.worker_event("c", dispatch.VERSION)
        closing = asyncio.ensure_future(manager.dispatcher.close_engine(ENGINE))
        await until(lambda: dask.to("c")[-1:] == ["Close"])
        assert dask.to("a")[-1] == "Close"
        assert dask.to("b") == []
        await manager.dispatcher.close_engine(ENGINE)  # a second call has nothing to do
        say(manager, opened("c"))  # the message was on its way
        say(manager, did.Closed("a"))
        assert not closing.done()
        say(manager, did.Closed("c"))
        await closing
        assert tasks.asked[-1] == ("close",), "the last engine takes the connection along"
        assert dask.logged[-1] == {"action": "close", "engine": ENGINE}

    asyncio.run(run())


def test_commands_leave_for_where_they_belong() -> None:
    async def run() -> None:
        dask = DaskByHand("a")
        manager, state, tasks, _, window = await decoding(dask)
        (gang,) = [one.window.gang for one in state.life.chains["a"].outstanding.values()]
        carry_out = partial(enact, state=state, submitter=tasks, send=manager.dispatcher._send)  # type: ignore[arg-type]
        carry_out(to.Release("a", 1))
        assert dask.to("a")[-1] == "Release"
        sent = len(dask.sent)
        carry_out(to.Release("gone", 1))
        assert len(dask.sent) == sent, "its end is heard of next"
        carry_out(do.Note("repair", "recomputed 3 tokens"))
        assert state.figures.events[-1].text == "recomputed 3 tokens"
        carry_out(do.ForgetTasks(gang, True))
        assert tasks.asked[-1] == ("forget", window, True)
        carry_out(Delivery(5, (1, 2)))
        assert (await state.take_events(0, 0, 0.0))[-1].tokens == (1, 2)
        before = len(dask.sent), len(tasks.asked)
        carry_out(do.Refuse(6, ClusterError("it is the answer of the client's call")))
        assert (len(dask.sent), len(tasks.asked)) == before

    asyncio.run(run())


def test_a_command_that_nobody_carries_out_ends_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        manager, state, _ = await open_on(DaskByHand("a"), timeout_close=0.01)
        monkeypatch.setattr(state.machine, "handle", lambda event, now: [Tick()])  # an event is no command
        assert manager.dispatcher.handle(state, Tick()) == []
        assert "nobody carries out Tick" in str(state.broken)
        await until(lambda: state.is_closing)
        say(manager, did.Closed("a"))

    asyncio.run(run())


def test_the_clock_tells_engines_which_workers_dask_has_paused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "TICK_SECONDS", 0.001)

    async def run() -> None:
        dask = DaskByHand("a", "b")
        _, state, _ = await open_on(dask)
        dask.workers["a"].status = Status.paused
        await asyncio.wait_for(_seen(state, {"a"}), 30)
        dask.workers["a"].status = Status.running
        await asyncio.wait_for(_seen(state, set()), 30)

    asyncio.run(run())


async def _seen(state: EngineState, paused: set[str]) -> None:
    while state.life.paused != paused:
        await asyncio.sleep(0.001)


def test_scaling_down_spares_workers_that_open_or_hold_what_fits_nowhere_else() -> None:
    async def run() -> None:
        dask = DaskByHand("a", "b")
        manager, state, *_ = await decoding(dask)
        dask.join("new")
        manager.worker_event("new", dispatch.VERSION)
        everybody = [*dask.workers.values()]
        may_go = {one.address for one in manager.valid_workers_downscaling(dask, everybody)}  # type: ignore[arg-type]
        assert "new" not in may_go, "it opens the engine"
        assert len(may_go) == 1, "what lies on one fits the other, but not on none"
        say(manager, did.OpenFailed("new", ClusterError("no memory")))
        assert "new" not in state.needs()
        for number in (2, 3):
            ask(manager, number, tokens=20)
        assert state.needs() == {"a", "b"}, "one waits for room"

    asyncio.run(run())
