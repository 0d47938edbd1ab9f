"""Dask retires workers: they are emptied first, and a worker stays if its blocks do not fit elsewhere."""

from __future__ import annotations

import asyncio
from array import array
from typing import Any

import pytest
from _by_hand import ENGINE, DaskByHand, open_on, until

from distkv_dask.messages import from_worker as did
from distkv_dask.messages import to_worker as to
from distkv_dask.messages.client_calls import Generate
from distkv_dask.sampling import SamplingParams


async def one_request(dask: DaskByHand, **settings: Any) -> tuple[Any, Any, str]:
    """A request on one worker."""
    manager, state, _ = await open_on(dask, **settings)
    sampling = SamplingParams(max_new_tokens=4)
    manager.submit(ENGINE, (Generate(1, array("i", range(6)), sampling),))
    return manager, state, state.life.ledger.sequences[1].home


@pytest.mark.parametrize(
    "call", [{"workers": ["a", "b"]}, {"names": ["name-a", "name-b"]}, {"n": 2}], ids=["addresses", "names", "any"]
)
def test_empty_workers_go_at_once_however_dask_names_them(call: dict[str, Any]) -> None:
    async def run() -> None:
        dask = DaskByHand("a", "b", "c")
        manager, state, _ = await open_on(dask)
        retired = await manager.retire_workers(**call, close_workers=True, remove=False, stimulus_id="why")
        assert {*retired} == {"a", "b"}
        assert retired["a"] == {"close_workers": True, "remove": False, "stimulus_id": "why"}
        assert {worker for worker, one in state.life.ledger.workers.items() if one.retiring} == {"a", "b"}

    asyncio.run(run())


def test_a_worker_that_keeps_blocks_stays_and_gets_work_again() -> None:
    async def run() -> None:
        dask = DaskByHand("a", "b")
        manager, state, home = await one_request(dask, timeout_drain=0.01)
        (other,) = {"a", "b"} - {home}
        retired = await manager.retire_workers(workers=[home, other])
        assert {*retired} == {other}
        assert not state.life.ledger.workers[home].retiring
        assert state.life.ledger.workers[other].retiring, "it is about to go"

    asyncio.run(run())


def test_workers_get_work_again_where_dask_fails_to_retire_them() -> None:
    async def run() -> None:
        dask = DaskByHand("a", "b")
        manager, state, _ = await open_on(dask)

        async def fail(**options: Any) -> dict[str, Any]:
            raise OSError("no")

        dask.retire_workers = fail  # type: ignore[method-assign]
        with pytest.raises(OSError, match="no"):
            await manager.retire_workers(workers=["a"])
        assert not state.life.ledger.workers["a"].retiring

    asyncio.run(run())


def test_a_worker_goes_as_soon_as_its_request_has_ended() -> None:
    async def run() -> None:
        dask = DaskByHand("a", "b")
        manager, state, home = await one_request(dask)
        retiring = asyncio.ensure_future(manager.retire_workers(workers=[home]))
        await until(lambda: state.life.ledger.workers[home].retiring)
        manager.stop(ENGINE, 1, "cancelled")
        while asked := [one for one in dask.sent if isinstance(one, to.Retire)]:
            dask.sent = [one for one in dask.sent if one not in asked]
            for one in asked:
                manager.worker_event(one.worker, "", ENGINE, did.Retired(one.worker, one.sequence))
        assert {*await asyncio.wait_for(retiring, 30)} == {home}

    asyncio.run(run())


def test_an_engine_that_closes_holds_nobody_up() -> None:
    async def run() -> None:
        dask = DaskByHand("a", "b")
        manager, state, home = await one_request(dask)
        retiring = asyncio.ensure_future(manager.retire_workers(workers=[home]))
        await until(lambda: state.life.ledger.workers[home].retiring)
        state.start_closing()
        assert {*await asyncio.wait_for(retiring, 30)} <= {home}

    asyncio.run(run())
