"""Graphs that can wait are collected, and hurrying, forgetting or adding tasks in the meantime works correctly."""

from __future__ import annotations

import asyncio
from typing import Any

from distributed import Client, Scheduler, SchedulerPlugin, Worker

from distkv_dask.gang import Gang
from distkv_dask.graphs.build import StepGraph, gang_keys
from distkv_dask.placement import Endpoint
from distkv_dask.scheduler.tasks.submitter import Submitter
from tests._cluster import gen_cluster

LATER = 60.0


class Graphs(SchedulerPlugin):
    """Keys of each graph that was sent to the scheduler."""

    def __init__(self, submitter: Submitter) -> None:
        self.submitter = submitter
        self.keys: list[set[str]] = []

    def update_graph(self, scheduler: Scheduler, *, keys: set[str], **kwargs: Any) -> None:
        self.keys.append(set(keys))

    def transition(self, key: str, start: str, finish: str, *args: Any, **kwargs: Any) -> None:
        self.submitter.transition(key, finish)


def window(number: int, home: str, *holders: str) -> tuple[StepGraph, list[Gang]]:
    """A gang whose tasks do nothing."""
    gang = Gang("engine", number, f"decode-{number}", 0, home, tuple(Endpoint(one, "", 0) for one in holders))
    graph = StepGraph()
    for key, worker in zip(gang_keys(gang), (home, *holders), strict=True):
        graph.add(key, worker, int)
    return graph, [gang]


async def opened(scheduler: Scheduler) -> tuple[Submitter, Graphs]:
    submitter = Submitter(scheduler, lambda *failure: None)
    await submitter.open()
    graphs = Graphs(submitter)
    scheduler.add_plugin(graphs, name="graphs")
    return submitter, graphs


async def until(done: Any) -> None:
    for _ in range(200):
        if done():
            return
        await asyncio.sleep(0.02)
    raise AssertionError("did not come")


@gen_cluster(client=True, nthreads=[("127.0.0.1", 1)] * 2)
async def test_windows_that_have_time_cost_the_scheduler_one_graph(
    client: Client, scheduler: Scheduler, a: Worker, b: Worker
) -> None:
    submitter, graphs = await opened(scheduler)
    for number in range(3):
        submitter.submit(*window(number, a.address, b.address), patience=0.1)
    await until(lambda: submitter.ended[0] == 6)
    assert [len(keys) for keys in graphs.keys] == [6]
    await submitter.close()


@gen_cluster(client=True, nthreads=[("127.0.0.1", 1)] * 2)
async def test_what_is_urgent_takes_along_what_has_time_and_keeps_the_order(
    client: Client, scheduler: Scheduler, a: Worker, b: Worker
) -> None:
    submitter, graphs = await opened(scheduler)
    submitter.submit(*window(0, a.address), patience=LATER)
    submitter.submit(*window(1, b.address))
    await until(lambda: submitter.ended[0] == 2)
    assert graphs.keys == [{"decode-0", "decode-1"}]
    submitter.submit(*window(2, a.address), patience=LATER)
    submitter.hurry(b.address)
    assert submitter._gathered, "nobody at this home waits for it"
    submitter.hurry(a.address)
    await until(lambda: submitter.ended[0] == 3)
    submitter.submit(*window(3, a.address), patience=LATER)
    await submitter.drained("engine", 0.0)
    await until(lambda: submitter.ended[0] == 4)
    await submitter.close()


@gen_cluster(client=True, nthreads=[("127.0.0.1", 1)] * 2)
async def test_a_window_that_is_given_up_before_it_was_sent_never_runs(
    client: Client, scheduler: Scheduler, a: Worker, b: Worker
) -> None:
    submitter, graphs = await opened(scheduler)
    given_up = window(0, a.address, b.address)
    submitter.submit(*given_up, patience=LATER)
    submitter.submit(*window(1, a.address), patience=LATER)
    submitter.forget_tasks(given_up[1][0], finished=False)
    submitter.flush()
    await until(lambda: submitter.ended[0] == 1)
    assert graphs.keys == [{"decode-1"}]
    await submitter.close()
