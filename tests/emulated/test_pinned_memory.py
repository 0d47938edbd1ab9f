"""Copies from and to pinned memory are queued: the host sees them, and may reuse its buffers, once it has waited."""

from __future__ import annotations

import gc
import threading

import pytest
import torch

import emulated
from emulated.pinned import _pieces
from emulated.transfers import _Arrival


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32, torch.int64, torch.uint8], ids=str)
@pytest.mark.parametrize("inference", [False, True])
def test_the_host_sees_a_copy_only_once_it_has_waited(dtype: torch.dtype, inference: bool) -> None:
    with torch.inference_mode(inference):
        x = torch.arange(5, device="cuda").to(dtype)
        target = torch.zeros(5, dtype=dtype, pin_memory=True)
        target.copy_(x, non_blocking=True)
        unseen = target.clone()
        assert not any(a == b for a, b in zip(unseen.tolist(), [0, 1, 2, 3, 4], strict=True))
        torch.cuda.Event().synchronize()  # was never recorded
        assert target.view(torch.uint8).tolist() == unseen.view(torch.uint8).tolist()
        torch.cuda.current_stream().synchronize()
        assert target.tolist() == [0, 1, 2, 3, 4]


def test_two_threads_that_wait_for_the_same_stream_both_see_the_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    target = torch.zeros(3, pin_memory=True)
    target.copy_(torch.ones(3, device="cuda"), non_blocking=True)
    arriving, go_on, seen = threading.Event(), threading.Event(), list[list[float]]()
    happen = _Arrival.happen

    def slowly(arrival: _Arrival) -> None:
        arriving.set()
        assert go_on.wait(30)
        happen(arrival)

    def wait() -> None:
        torch.cuda.synchronize()
        seen.append(target.tolist())

    monkeypatch.setattr(_Arrival, "happen", slowly)
    first, second = threading.Thread(target=wait), threading.Thread(target=wait)
    first.start()
    assert arriving.wait(30)
    second.start()
    second.join(0.2)
    go_on.set()
    for thread in (first, second):
        thread.join(30)
    assert seen == [[1, 1, 1]] * 2


def test_to_with_non_blocking_gives_pinned_memory() -> None:
    copied = torch.ones(3, device="cuda").to("cpu", non_blocking=True)
    assert copied.is_pinned()
    assert copied.isnan().all()
    torch.cuda.synchronize()
    assert copied.tolist() == [1, 1, 1]


def test_what_was_computed_before_the_copy_is_what_arrives() -> None:
    x = torch.ones(2, device="cuda")
    target = torch.empty(2, pin_memory=True).copy_(x, non_blocking=True)
    x.zero_()
    torch.cuda.synchronize()
    assert target.tolist() == [1, 1]


def test_a_source_changed_before_the_host_has_waited_raises() -> None:
    source, x = torch.ones(4).pin_memory(), torch.empty(4, device="cuda")
    x.copy_(source, non_blocking=True)
    source[2] = 5
    with pytest.raises(emulated.RaceError, match="changed pinned memory"):
        torch.cuda.synchronize()
    x.copy_(source, non_blocking=True)
    torch.cuda.current_stream().record_event().synchronize()
    source.zero_()
    torch.cuda.synchronize()
    assert x.tolist() == [1, 1, 5, 1]


def test_ordinary_memory_may_change_at_once() -> None:
    source, x = torch.ones(4), torch.empty(4, device="cuda")
    x.copy_(source, non_blocking=True)
    source.zero_()
    torch.cuda.synchronize()
    assert x.tolist() == [1, 1, 1, 1]


def test_a_stream_reads_what_it_has_copied_to_the_host_itself() -> None:
    x, y, buffer = torch.ones(4, device="cuda"), torch.zeros(4, device="cuda"), torch.empty(4, pin_memory=True)
    buffer.copy_(x, non_blocking=True)
    y.copy_(buffer, non_blocking=True)
    assert buffer.isnan().all()
    buffer.copy_(x + 1, non_blocking=True)
    torch.cuda.synchronize()
    assert (y.tolist(), buffer.tolist()) == ([1] * 4, [2] * 4)


def test_two_streams_and_one_buffer_without_an_order_raise() -> None:
    x, buffer = torch.ones(4, device="cuda"), torch.empty(4, pin_memory=True)
    torch.cuda.synchronize()
    buffer.copy_(x, non_blocking=True)
    with torch.cuda.stream(torch.cuda.Stream()), pytest.raises(emulated.RaceError):
        buffer.copy_(x, non_blocking=True)
    torch.cuda.synchronize()


def test_memory_is_pinned_by_whoever_made_a_tensor_of_it_and_is_forgotten_with_it() -> None:
    gc.collect()
    before = len(_pieces)
    made = [torch.empty(8, pin_memory=True), torch.ones(3).pin_memory(), torch.full((2,), 3, pin_memory=True)]
    assert all(one.is_pinned() and one[1:].is_pinned() for one in made)
    assert torch.from_numpy(made[0].numpy()).is_pinned()
    assert made[0].pin_memory() is made[0]
    assert not torch.empty(3).is_pinned()
    assert len(_pieces) == before + 3
    made.clear()
    gc.collect()
    assert len(_pieces) == before
