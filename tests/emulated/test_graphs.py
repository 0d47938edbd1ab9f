"""Graphs: a capture changes nothing and refuses what a card refuses; a replay does everything or says why it cannot."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import emulated


def captured(run: Callable[[], object], **settings: object) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, **settings):
        run()
    return graph


def test_replays_compute_with_what_memory_holds_then() -> None:
    x, total, made = torch.ones(4, device="cuda"), torch.zeros(1, device="cuda"), []

    def step() -> None:
        made.append((x * 2).view(2, 2))
        total.add_(made[0].sum())

    graph = captured(step)
    assert total.item() == 0
    assert made[0].isnan().all()
    for value in (1.0, 5.0):
        x.fill_(value)
        graph.replay()
        assert made[0].tolist() == [[2 * value] * 2] * 2
    assert total.item() == 8 + 40


def test_a_replay_is_one_call_of_the_host() -> None:
    x = torch.ones(4, device="cuda")
    graph = captured(lambda: [x.add_(1) for _ in range(10)])
    with emulated.counting() as counts:
        graph.replay()
    assert {entry.kind for entry in counts.number} == {"replay"}
    assert x.tolist() == [11] * 4


def test_indices_are_read_anew() -> None:
    pool, at, row = torch.zeros(4, 64, device="cuda"), torch.zeros(1, dtype=torch.int64, device="cuda"), []
    graph = captured(lambda: row.append(pool.index_copy_(0, at, torch.ones(1, 64, device="cuda"))[at]))
    for number in (2, 3):
        at.fill_(number)
        graph.replay()
        assert row[0].sum().item() == 64
    assert pool.sum(1).tolist() == [0, 0, 64, 64]


def test_copies_go_between_the_same_buffers() -> None:
    source, target, x = torch.ones(2).pin_memory(), torch.zeros(2, pin_memory=True), torch.zeros(2, device="cuda")

    def step() -> None:
        x.copy_(source, non_blocking=True)
        target.copy_(x + 1, non_blocking=True)

    graph = captured(step)
    assert target.tolist() == [0, 0]
    for value in (3.0, 4.0):
        source.fill_(value)
        graph.replay()
        assert target.isnan().all()
        torch.cuda.current_stream().synchronize()
        assert target.tolist() == [value + 1] * 2
    graph.replay()
    source.zero_()
    with pytest.raises(emulated.RaceError, match="changed pinned memory"):
        torch.cuda.synchronize()


@pytest.mark.parametrize(
    "call",
    [
        lambda x: x.sum().item(),
        lambda x: x.cpu(),
        lambda x: x.to("cpu", non_blocking=False),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x[torch.tensor([0])],
        lambda x: torch.tensor([1], device="cuda"),
        lambda x: x.copy_(torch.ones(4), non_blocking=True),
        lambda x: x.copy_(torch.ones(4).pin_memory()),
        lambda x: torch.empty(4).copy_(x, non_blocking=True),
        lambda x: torch.cuda.synchronize(),
        lambda x: torch.cuda.current_stream().synchronize(),
        lambda x: torch.cuda.current_stream().query(),
        lambda x: torch.cuda.current_stream().record_event().synchronize(),
        lambda x: torch.cuda.Event().synchronize(),
        lambda x: torch.cuda.current_stream().record_event().query(),
        lambda x: torch.cuda.current_stream().wait_stream(torch.cuda.default_stream()),
    ],
)
def test_what_stops_or_leaves_the_stream_is_refused_in_a_capture(call: Callable[[Tensor], object]) -> None:
    x = torch.ones(4, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(emulated.CaptureError), torch.cuda.graph(graph):
        call(x)
    assert not torch.cuda.is_current_stream_capturing()
    assert x.sum().item() == 4


def test_a_refused_call_makes_the_capture_void_even_if_it_is_caught() -> None:
    x = torch.ones(4, device="cuda")

    def step() -> None:
        with pytest.raises(emulated.CaptureError):
            x.sum().item()

    with pytest.raises(emulated.CaptureError, match="void"):
        captured(step)


@pytest.mark.parametrize("mode", ["global", "thread_local"])
def test_other_threads_may_not_stop_while_a_capture_is_global(mode: str) -> None:
    x, y, faults = torch.ones(4, device="cuda"), torch.ones(4, device="cuda"), []

    def other() -> None:
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                y.sum().item()
        except emulated.CaptureError as fault:
            faults.append(fault)

    def step() -> None:
        x.add_(1)
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()

    if mode == "global":
        with pytest.raises(emulated.CaptureError, match="void"):
            captured(step)
    else:
        captured(step, capture_error_mode=mode)
    assert len(faults) == (mode == "global")


def test_memory_that_was_freed_or_replaced_since_is_noticed() -> None:
    parts = {"x": torch.ones(4, device="cuda")}
    graph = captured(lambda: parts["x"].add_(1))
    graph.replay()
    parts["x"] = parts["x"].clone()
    with pytest.raises(emulated.StaleGraphError, match=r"add_ \(.*test_graphs.py"):
        graph.replay()


def test_pinned_memory_that_was_freed_since_is_noticed() -> None:
    x, sources = torch.ones(4, device="cuda"), [torch.ones(4).pin_memory()]
    graph = captured(lambda: x.copy_(sources[0], non_blocking=True))
    graph.replay()
    torch.cuda.synchronize()
    sources.clear()
    gc.collect()
    with pytest.raises(emulated.StaleGraphError, match="pinned"):
        graph.replay()


def test_numbers_of_the_host_that_have_changed_since_are_noticed() -> None:
    x, number = torch.ones(4, device="cuda"), torch.tensor(2.0)
    graph = captured(lambda: x.mul_(number))
    graph.replay()
    number.fill_(3)
    with pytest.raises(emulated.StaleGraphError, match=r"captured with 2\.0"):
        graph.replay()
    assert x.tolist() == [2] * 4


def test_streams_join_a_capture_by_events_and_must_come_back() -> None:
    x, side = torch.ones(4, device="cuda"), torch.cuda.Stream()
    y = torch.zeros(4, device="cuda")

    def step(back: bool, ordered: bool = True) -> None:
        main = torch.cuda.current_stream()
        if not ordered:
            x.add_(1)
        side.wait_stream(main)
        if ordered:
            x.add_(1)
        with torch.cuda.stream(side):
            y.add_(x if not ordered else 1)
        if back:
            main.wait_stream(side)

    captured(lambda: step(back=True)).replay()
    assert (x.tolist(), y.tolist()) == ([2] * 4, [1] * 4)
    captured(lambda: step(back=True, ordered=False)).replay()
    with pytest.raises(emulated.CaptureError, match="does not wait"):
        captured(lambda: step(back=False))


def test_races_within_a_capture_and_between_replays_are_seen() -> None:
    x, side = torch.ones(4, device="cuda"), torch.cuda.Stream()

    def step() -> None:
        side.wait_stream(torch.cuda.current_stream())
        x.add_(1)
        with torch.cuda.stream(side):
            x.add_(1)

    with pytest.raises(emulated.RaceError):
        captured(step)
    own = captured(lambda: torch.ones(3, device="cuda") * 2)
    own.replay()
    with torch.cuda.stream(side), pytest.raises(emulated.RaceError):
        own.replay()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        own.replay()
    same_pool = captured(lambda: torch.ones(3, device="cuda") * 2, pool=own.pool())
    with torch.cuda.stream(side):
        own.replay()
    with pytest.raises(emulated.RaceError):
        same_pool.replay()
    torch.cuda.synchronize()


def test_replays_are_ordered_like_any_work() -> None:
    x = torch.ones(4, device="cuda")
    graph = captured(lambda: x.add_(1))
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        x.add_(1)
    with pytest.raises(emulated.RaceError) as raised:
        graph.replay()
    assert "in a graph: add_" in raised.value.__notes__[0]
    torch.cuda.synchronize()
    graph.replay()
    assert x.tolist() == [3] * 4


def test_a_graph_is_captured_once_and_on_a_stream_of_its_own() -> None:
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(emulated.CaptureError, match="non-default"):
        graph.capture_begin()
    with pytest.raises(emulated.CaptureError, match="without a preceding"):
        graph.replay()
    with torch.cuda.graph(graph):
        pass
    with pytest.raises(emulated.CaptureError, match="reset"), torch.cuda.graph(graph):
        pass
    graph.reset()
    with torch.cuda.graph(graph):
        pass
    graph.replay()


def test_memory_of_results_that_are_gone_is_free_again() -> None:
    before = torch.cuda.memory_allocated()
    kept = []
    graph = captured(lambda: kept.append(torch.ones(1000, device="cuda") * 2 + 1))
    assert torch.cuda.memory_allocated() - before == 4096
    graph.replay()
    assert kept[0].sum().item() == 3000
