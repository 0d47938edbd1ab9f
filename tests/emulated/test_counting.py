"""Launches, waits, copies and allocations of all threads are counted correctly, with the line that asked for them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import emulated


def count(run: Callable[[Tensor], object]) -> dict[str, int]:
    x = torch.ones(4, 4, device="cuda")
    with emulated.counting() as counts:
        run(x)
    kinds = ("launch", "sync", "h2d", "d2h", "alloc")
    return {kind: counts.of(kind) for kind in kinds if counts.of(kind)}


INDEX = torch.tensor([1, 2])
PINNED_CASES: list[tuple[Callable[[Tensor], object], dict[str, int]]] = [
    (lambda x: x + 1, {"launch": 1, "alloc": 1}),
    (lambda x: x.add_(1), {"launch": 1}),
    (lambda x: torch.add(x, 1, out=x), {"launch": 1}),
    (lambda x: x.view(-1)[2:].reshape(2, 7).t(), {}),
    (lambda x: x.t().reshape(-1), {"launch": 1, "alloc": 1}),
    (lambda x: torch.empty_like(x), {"alloc": 1}),
    (lambda x: torch.zeros(3, device="cuda"), {"launch": 1, "alloc": 1}),
    (lambda x: x.to(torch.float32), {}),
    (lambda x: x.to(torch.bfloat16), {"launch": 1, "alloc": 1}),
    (lambda x: x[0, 0].item(), {"sync": 1, "d2h": 1}),
    (lambda x: bool((x > 0).all()), {"launch": 2, "alloc": 2, "sync": 1, "d2h": 1}),
    (lambda x: x.tolist(), {"sync": 1, "d2h": 1}),
    (lambda x: x.cpu(), {"sync": 1, "d2h": 1}),
    (lambda x: x.nonzero(), {"launch": 1, "sync": 1, "alloc": 1}),
    (lambda x: x[x > 0], {"launch": 2, "sync": 1, "alloc": 2}),
    (lambda x: x[INDEX], {"launch": 1, "sync": 1, "h2d": 1, "alloc": 1}),
    (lambda x: torch.tensor([1], device="cuda"), {"sync": 1, "h2d": 1, "alloc": 1}),
    (lambda x: torch.ones(3).to("cuda"), {"sync": 1, "h2d": 1, "alloc": 1}),
    (lambda x: torch.ones(3).to("cuda", non_blocking=True), {"h2d": 1, "alloc": 1}),
    (lambda x: torch.ones(3).pin_memory().to("cuda", non_blocking=True), {"h2d": 1, "alloc": 1}),
    (lambda x: x.to("cpu", non_blocking=True), {"d2h": 1}),
    (lambda x: torch.empty(4, 4).copy_(x, non_blocking=True), {"d2h": 1, "sync": 1}),
    (lambda x: torch.empty(4, 4, pin_memory=True).copy_(x, non_blocking=True), {"d2h": 1}),
    (lambda x: torch.empty(4, 4, pin_memory=True).copy_(x), {"d2h": 1, "sync": 1}),
    (lambda x: torch.empty(4, 4, pin_memory=True).copy_(x.t(), non_blocking=True), {"launch": 1, "alloc": 1, "d2h": 1}),
    (lambda x: torch.cuda.synchronize(), {"sync": 1}),
    (lambda x: torch.cuda.current_stream().synchronize(), {"sync": 1}),
    (lambda x: torch.cuda.Event().record(), {}),
]


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("at", range(len(PINNED_CASES)))
def test_small_programs(at: int, inference: bool) -> None:
    run, expected = PINNED_CASES[at]
    with torch.inference_mode(inference):
        assert count(run) == expected


def test_bytes_of_copies_and_allocations() -> None:
    with emulated.counting() as counts:
        x = torch.ones(1000).to("cuda")
        x[:10].cpu()
    assert [counts.bytes_of(kind) for kind in ("h2d", "d2h", "alloc")] == [4000, 40, 4096]


def test_counts_name_the_line_and_the_thread() -> None:
    x = torch.ones(2, device="cuda")

    def work() -> None:
        x.add_(1)

    with emulated.counting() as counts:
        thread = threading.Thread(target=work, name="a lane")
        thread.start()
        thread.join()
    (entry,) = counts.number
    line = work.__code__.co_firstlineno + 1
    assert (entry.name, entry.place, entry.thread) == ("add_", f"tests/emulated/{Path(__file__).name}:{line}", "a lane")
    assert entry.place in counts.table()


def test_counts_may_overlap() -> None:
    x = torch.ones(2, device="cuda")
    with emulated.counting() as outer:
        x.add_(1)
        with emulated.counting() as inner:
            x.add_(1)
    assert (outer.of("launch"), inner.of("launch")) == (2, 1)
