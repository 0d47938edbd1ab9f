"""Every call of a client at the gManager: what is refused, with which words, and what follows from it."""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Awaitable, Callable
from functools import wraps
from typing import Any

import pytest
from _by_hand import ENGINE, DaskByHand, open_engine, open_on, opened, say, spec, started, until

from distkv_dask.errors import CapacityError, ClusterError, EngineClosedError
from distkv_dask.messages import from_worker as did
from distkv_dask.messages.client_calls import Generate
from distkv_dask.messages.names import HANDLE_NUMBERS, PLUGIN, unpack
from distkv_dask.messages.to_worker import Open
from distkv_dask.sampling import SamplingParams
from distkv_dask.version import VERSION


def at_once(test: Callable[[], Awaitable[None]]) -> Callable[[], None]:
    @wraps(test)
    def run() -> None:
        asyncio.run(test())

    return run


def submission(number: int, tokens: int = 6, new: int = 4) -> Generate:
    return Generate(number, array("i", range(tokens)), SamplingParams(max_new_tokens=new))


@at_once
async def test_instances_open_first_and_memory_workers_are_told_what_they_loaded() -> None:
    dask = DaskByHand("a", "b", memory=["m"])
    manager = await started(dask)
    opening = asyncio.ensure_future(manager.open(spec(), "client", VERSION))
    await until(lambda: dask.to("b"))
    say(manager, opened("a"))
    await asyncio.sleep(0)
    assert dask.to("m") == [], "one instance may still fail"
    say(manager, opened("b"))
    await until(lambda: dask.to("m"))
    assert not opening.done()
    say(manager, opened("m", "memory"))
    assert unpack(await opening).workers == 3
    geometries = {one.worker: one.geometry for one in dask.sent if isinstance(one, Open)}
    assert geometries == {"a": None, "b": None, "m": opened("a").geometry}


REFUSALS: dict[str, tuple[DaskByHand, tuple[did.FromWorker, ...], str]] = {
    "memory only": (DaskByHand(memory=["m"]), (), "no workers that may load a model"),
    "one fails": (
        DaskByHand("a", "b"),
        (did.OpenFailed("a", ClusterError("no such model")), opened("b")),
        "no such model",
    ),
    "silence": (DaskByHand("a", "b"), (opened("a"),), r"\['b'\] did not open the engine within 0.01 s"),
}


@pytest.mark.parametrize("why", REFUSALS)
def test_an_engine_that_cannot_open_says_why_and_is_closed(why: str) -> None:
    dask, answers, words = REFUSALS[why]

    async def run() -> None:
        manager = await started(dask)
        with pytest.raises(ClusterError, match=words):
            await open_engine(manager, *answers, timeout_open=0.01, timeout_close=0.01)
        assert not manager.engines
        assert all(dask.to(worker)[-1:] == ["Close"] for worker in {one.worker for one in dask.sent} - {"a"})

    asyncio.run(run())


@at_once
async def test_workers_that_die_while_an_engine_opens_are_named() -> None:
    dask = DaskByHand("a")
    manager = await started(dask)
    opening = asyncio.ensure_future(manager.open(spec(), "client", VERSION))
    await until(lambda: dask.to("a"))
    dask.leave("a")
    manager.remove_worker(dask, "a")  # type: ignore[arg-type]
    with pytest.raises(ClusterError, match="worker a died while it opened the engine"):
        await opening


@pytest.mark.parametrize(
    ("version", "answer", "said"),
    [
        ("0.0.1", None, f"worker late runs distkv-dask 0.0.1, the scheduler {VERSION}: install the same version"),
        (VERSION, did.OpenFailed("late", ClusterError("it needs 4 GiB")), "it needs 4 GiB"),
    ],
    ids=["another version", "no room"],
)
def test_a_late_worker_that_cannot_open_an_engine_is_an_event_and_in_the_log(
    version: str, answer: did.FromWorker | None, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def run() -> None:
        dask = DaskByHand("a")
        manager, state, _ = await open_on(dask)
        dask.join("late")
        manager.worker_event("late", version)
        if answer is not None:
            say(manager, answer)
        (event,) = [one for one in state.figures.events if one.kind == "failure"]
        assert "late" in event.text
        assert said in event.text
        assert state.status().totals["failure_events"] == 1
        (line,) = [one.getMessage() for one in caplog.records if one.levelname == "ERROR"]
        assert f"engine {ENGINE} cannot open on late: " in line
        assert said in line
        assert unpack(await manager.attach(ENGINE, "guest", VERSION)).facts.workers == 1

    asyncio.run(run())


@at_once
async def test_whoever_attaches_while_all_workers_are_gone_waits_for_one() -> None:
    dask = DaskByHand("a")
    manager, state, _ = await open_on(dask)
    dask.join("late")
    manager.worker_event("late", VERSION)
    say(manager, did.OpenFailed("late", ClusterError("no room")))  # long before: it concerns nobody who attaches
    dask.leave("a")
    manager.remove_worker(dask, "a")  # type: ignore[arg-type]
    attaching = [asyncio.ensure_future(manager.attach(ENGINE, client, VERSION)) for client in ("guest", "c1", "c2")]
    dask.join("m", memory=True)
    manager.worker_event("m", VERSION)
    say(manager, opened("m", "memory"))
    await asyncio.sleep(0.01)
    assert not any(one.done() for one in attaching), "a worker that only holds KV answers nothing"
    del dask.clients["c2"]
    dask.join("b")
    manager.worker_event("b", VERSION)
    say(manager, opened("b"))
    assert [unpack(await one).handle for one in attaching[:2]] == [1, 2]
    with pytest.raises(EngineClosedError, match="client c2 left"):
        await attaching[2]
    assert state.handles_of("c2") == []


@at_once
async def test_whoever_attaches_in_vain_is_told_what_is_true() -> None:
    dask = DaskByHand("a")
    manager, state, _ = await open_on(dask, timeout_open=0.01)
    dask.leave("a")
    manager.remove_worker(dask, "a")  # type: ignore[arg-type]
    with pytest.raises(ClusterError, match=r"engine has no worker now .* within 0\.01 s .*start some"):
        await manager.attach(ENGINE, "guest", VERSION)
    state.spec = spec(timeout_open=60)
    attaching = asyncio.ensure_future(manager.attach(ENGINE, "guest", VERSION))
    await asyncio.sleep(0)
    manager.dispatcher.close_soon(ENGINE)
    with pytest.raises(EngineClosedError, match="is closing"):
        await attaching


@at_once
async def test_whoever_attaches_while_an_engine_opens_gets_it_or_learns_why_not() -> None:
    for answer in (opened("b"), did.OpenFailed("b", ClusterError("no such model"))):
        manager = await started(DaskByHand("a", "b"))
        opening = asyncio.ensure_future(manager.open(spec(timeout_close=0.01), "client", VERSION))
        await until(lambda manager=manager: ENGINE in manager.engines and manager.engines[ENGINE].knows("b"))
        attaching = asyncio.ensure_future(manager.attach(ENGINE, "guest", VERSION))
        say(manager, opened("a"))
        await asyncio.sleep(0.01)
        assert not attaching.done(), "the other may still fail"
        say(manager, answer)
        if isinstance(answer, did.OpenFailed):
            for one in (opening, attaching):
                with pytest.raises(ClusterError, match="no such model"):
                    await one
        else:
            assert unpack(await attaching).facts.workers == unpack(await opening).workers == 2


@at_once
async def test_an_engine_whose_only_instance_dies_while_holders_open_it_does_not_open() -> None:
    dask = DaskByHand("a", memory=["m"])
    manager = await started(dask)
    opening = asyncio.ensure_future(manager.open(spec(timeout_close=0.01), "client", VERSION))
    await until(lambda: dask.to("a"))
    say(manager, opened("a"))
    await until(lambda: dask.to("m"))
    dask.leave("a")
    manager.remove_worker(dask, "a")  # type: ignore[arg-type]
    say(manager, opened("m", "memory"))
    with pytest.raises(ClusterError, match="worker a died while it opened the engine"):
        await opening


@at_once
async def test_a_worker_is_asked_once_it_has_said_its_version_and_not_if_it_is_another() -> None:
    dask = DaskByHand("a")
    manager = await started(dask)
    dask.join("late")
    dask.join("old")
    opening = asyncio.ensure_future(manager.open(spec(timeout_close=0.01), "client", VERSION))
    await until(lambda: dask.to("a"))
    say(manager, opened("a"))
    assert dask.to("late") == []
    manager.worker_event("late", VERSION)
    assert dask.to("late") == ["Open"]
    say(manager, opened("late"))
    assert not opening.done(), "the third is waited for"
    manager.worker_event("old", "0.0.1")
    with pytest.raises(ClusterError, match=rf"worker old runs distkv-dask 0\.0\.1, the scheduler {VERSION}"):
        await opening
    assert "Open" not in dask.to("old")


@at_once
async def test_clients_of_another_version_are_refused_whatever_they_call_first() -> None:
    manager, *_ = await open_on(DaskByHand("a"))
    calls: list[Callable[[], Any]] = [
        lambda: asyncio.ensure_future(manager.open(spec("other"), "client", "0.1")),
        lambda: asyncio.ensure_future(manager.attach(ENGINE, "client", "0.1")),
        lambda: manager.list_engines(""),
    ]
    for call in calls:
        with pytest.raises(ClusterError, match=r"this client runs distkv-dask .* the same version"):
            await call()
    assert [*manager.engines] == [ENGINE]


@at_once
async def test_an_engine_is_found_by_name_or_as_the_only_one() -> None:
    manager, state, _ = await open_on(DaskByHand("a"))
    one, two = unpack(await manager.attach("", "c1", VERSION)), unpack(await manager.attach(ENGINE, "c2", VERSION))
    assert (one.handle, two.handle) == (1, 2)
    assert one.spec.token == "", "the secret stays with the workers and the owner"
    assert state.handles_of("c1") == [1]
    await open_engine(manager, opened("a"), engine="other")
    with pytest.raises(ClusterError, match=r"several engines are open .*say which"):
        await manager.attach("", "c1", VERSION)
    for call in (manager.status, lambda name: manager.submit(name, ()), lambda name: manager.stop(name, 1, "stop")):
        with pytest.raises(EngineClosedError, match="engine nobody is closed"):
            call("nobody")
    state.start_closing()
    with pytest.raises(EngineClosedError, match="is closing"):
        await manager.attach(ENGINE, "c1", VERSION)
    with pytest.raises(EngineClosedError, match="is closing"):
        manager.submit(ENGINE, (submission(1),))
    assert unpack(await manager.attach("", "c1", VERSION)).handle == 1, "the only one that is open"
    assert {*unpack(manager.list_engines(VERSION))} == {ENGINE, "other"}


@at_once
async def test_without_any_engine_the_answer_says_how_to_open_one() -> None:
    manager = await started(DaskByHand("a"))
    with pytest.raises(ClusterError, match=r"no engine is open .*Engine\(client, model"):
        await manager.attach("", "client", VERSION)


@at_once
async def test_requests_are_taken_or_refused_one_by_one_and_stop_with_their_handle() -> None:
    manager, state, tasks = await open_on(DaskByHand("a"))
    number = unpack(await manager.attach(ENGINE, "guest", VERSION)).handle * HANDLE_NUMBERS
    refused = unpack(manager.submit(ENGINE, (submission(number), submission(number + 1, tokens=500))))
    assert {one: type(error) for one, error in refused.items()} == {number + 1: CapacityError}
    assert [one[0] for one in tasks.asked].count("submit") == 1
    manager.submit(ENGINE, (submission(5),))
    manager.detach(ENGINE, 1)
    manager.detach(ENGINE, 1)
    manager.detach("nobody", 1)
    assert state.life.requests[number].ended == "cancelled"
    assert state.life.requests[5].ended is None
    late = unpack(await manager.events(ENGINE, 1, 0, 0.0))  # returned: Dask would log what it raises
    assert isinstance(late, EngineClosedError)
    assert "attach again" in str(late)
    manager.stop(ENGINE, 5, "stop")
    assert [one.reason for one in unpack(await manager.events(ENGINE, 0, 0, 0.0))] == ["stop"]


@at_once
async def test_a_client_that_leaves_takes_its_engines_and_handles_along() -> None:
    dask = DaskByHand("a")
    manager, state, _ = await open_on(dask)
    handle = unpack(await manager.attach(ENGINE, "guest", VERSION)).handle
    manager.submit(ENGINE, (submission(handle * HANDLE_NUMBERS), submission(1)))
    manager.remove_client(dask, "guest")  # type: ignore[arg-type]
    assert state.handles_of("guest") == []
    assert state.life.requests[1].ended is None
    manager.remove_client(dask, "client")  # type: ignore[arg-type]
    await until(lambda: state.is_closing and dask.to("a")[-1] == "Close")
    say(manager, did.Closed("a"))
    await until(lambda: not manager.engines)


@at_once
async def test_spans_name_tasks_and_graphs_need_room() -> None:
    manager, _, tasks = await open_on(DaskByHand("a"))
    manager.enter_span(ENGINE, {"name": ["mine"], "ids": ["1"]})  # type: ignore[typeddict-item]
    manager.submit(ENGINE, (submission(1),))
    assert next(one for one in tasks.asked if one[0] == "submit")[4] == {"name": ("mine",), "ids": ("1",)}
    graph = unpack(manager.graph(ENGINE, 8, "window"))
    assert set(graph.workers.values()) == {"a"}
    assert len(unpack(manager.graph(ENGINE, 8, "layer")).tasks) > len(graph.tasks)
    with pytest.raises(CapacityError, match="a sequence of 4000 tokens needs 1000 blocks"):
        manager.graph(ENGINE, 4000, "window")


@at_once
async def test_a_gmanager_whose_workers_cannot_run_ours_takes_itself_out() -> None:
    dask = DaskByHand("a")
    dask.plugin_status = "error"
    with pytest.raises(ClusterError, match=r"failed to start on \['a'\]"):
        await started(dask)
    assert dask.extensions == {}
    assert dask.handlers == {"retire_workers": dask.retire_workers}
    assert dask.metadata == {PLUGIN: False, f"without {PLUGIN}": True}


@at_once
async def test_of_two_gmanagers_that_start_at_once_one_serves() -> None:
    dask = DaskByHand("a")
    one, two = await asyncio.gather(started(dask), _second(dask))
    assert dask.extensions == {PLUGIN: one}
    assert not hasattr(two, "dispatcher")


async def _second(dask: DaskByHand) -> Any:
    from distkv_dask.scheduler.gmanager import GManager

    manager = GManager()
    await manager.start(dask)  # type: ignore[arg-type]
    return manager


@at_once
async def test_a_scheduler_that_shuts_down_ends_requests_with_a_reason() -> None:
    manager, _, tasks = await open_on(DaskByHand("a"))
    manager.submit(ENGINE, (submission(1),))
    await manager.close()
    (news,) = unpack(await manager.events(ENGINE, 0, 0, 0.0))
    assert isinstance(news.error, EngineClosedError)
    assert "shut down" in str(news.error)
    assert tasks.asked[-1] == ("close",)
