"""Memory that two streams use raises an error if nothing orders the uses, and only then."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import emulated

Order = Callable[[torch.cuda.Stream, torch.cuda.Stream], None]


def nothing(first: torch.cuda.Stream, then: torch.cuda.Stream) -> None:
    pass


def by_event(first: torch.cuda.Stream, then: torch.cuda.Stream) -> None:
    event = torch.cuda.Event()
    event.record(first)
    then.wait_event(event)


def by_stream(first: torch.cuda.Stream, then: torch.cuda.Stream) -> None:
    then.wait_stream(first)


def through_a_third(first: torch.cuda.Stream, then: torch.cuda.Stream) -> None:
    third = torch.cuda.Stream()
    third.wait_stream(first)
    then.wait_stream(third)


def by_host(first: torch.cuda.Stream, then: torch.cuda.Stream) -> None:
    first.synchronize()


def by_device(first: torch.cuda.Stream, then: torch.cuda.Stream) -> None:
    torch.cuda.synchronize()


def by_polling(first: torch.cuda.Stream, then: torch.cuda.Stream) -> None:
    event = first.record_event()
    polls = 0
    while not event.query():
        polls += 1
    assert polls


def by_polling_the_stream(first: torch.cuda.Stream, then: torch.cuda.Stream) -> None:
    assert not first.query()
    assert first.query()


def too_early(first: torch.cuda.Stream, then: torch.cuda.Stream) -> None:
    event = torch.cuda.Event()
    then.wait_event(event)  # was never recorded
    event.record(first)


def wrong_way(first: torch.cuda.Stream, then: torch.cuda.Stream) -> None:
    first.wait_stream(then)


ORDERS = [by_event, by_stream, through_a_third, by_host, by_device, by_polling, by_polling_the_stream]
NO_ORDERS = [nothing, too_early, wrong_way]
USES = {
    "read after write": (lambda x: x.add_(1), lambda x: x + 1),
    "write after write": (lambda x: x.add_(1), lambda x: x.zero_()),
    "write after read": (lambda x: x + 1, lambda x: x.zero_()),
    "read of a view": (lambda x: x[2:].zero_(), lambda x: x[:, 1].sum()),
    "rows": (lambda x: x[index(1, 3)], lambda x: x.index_copy_(0, index(3), x.new_zeros(1, 64))),
    "copy to the host": (lambda x: x.add_(1), lambda x: x.cpu()),
    "copy from the host": (lambda x: x + 1, lambda x: x.copy_(torch.ones(4, 64))),
}


def index(*rows: int) -> Tensor:
    return torch.tensor(rows).pin_memory().to("cuda", non_blocking=True)


def run(first_use: Callable[[Tensor], object], then_use: Callable[[Tensor], object], order: Order) -> None:
    x = torch.ones(4, 64, device="cuda")
    torch.cuda.synchronize()
    first, then = torch.cuda.Stream(), torch.cuda.Stream()
    with torch.cuda.stream(first):
        kept = first_use(x)
    order(first, then)
    try:
        with torch.cuda.stream(then):
            then_use(x)
    finally:
        torch.cuda.synchronize()
        del kept


@pytest.mark.parametrize("uses", USES.values(), ids=USES)
@pytest.mark.parametrize("order", ORDERS)
def test_ordered_uses_pass(uses: tuple[Callable[[Tensor], object], ...], order: Order) -> None:
    run(*uses, order)


@pytest.mark.parametrize("uses", USES.values(), ids=USES)
@pytest.mark.parametrize("order", NO_ORDERS)
def test_uses_without_an_order_raise(uses: tuple[Callable[[Tensor], object], ...], order: Order) -> None:
    with pytest.raises(emulated.RaceError, match="nothing orders"):
        run(*uses, order)


@pytest.mark.parametrize(
    "uses",
    [
        (lambda x: x + 1, lambda x: x * 2),
        (lambda x: x[0].zero_(), lambda x: x[1:].sum()),
        (lambda x: x[:, :16].zero_(), lambda x: x[:, 16:].sum()),
        (lambda x: x.index_copy_(0, index(0, 2), x.new_zeros(2, 64)), lambda x: x[index(1, 3)]),
        (lambda x: x.index_put_((index(2),), x.new_zeros(64)), lambda x: x.index_select(0, index(3))),
    ],
)
def test_uses_of_other_bytes_and_reads_need_no_order(uses: tuple[Callable[[Tensor], object], ...]) -> None:
    run(*uses, nothing)


def test_results_are_written_by_the_stream_that_made_them() -> None:
    for make in (lambda: torch.ones(4, device="cuda"), lambda: torch.arange(4, device="cuda"), lambda: index(1)):
        with torch.cuda.stream(torch.cuda.Stream()):
            made = make()
        with pytest.raises(emulated.RaceError):
            made + 1
        torch.cuda.synchronize()
        made + 1


def test_the_message_names_both_operations_and_their_lines() -> None:
    with pytest.raises(emulated.RaceError, match=r"sum \(.*test_races.py:\d+\) reads .* written .* by zero_"):
        run(lambda x: x.zero_(), lambda x: x.sum(), nothing)


def test_memory_freed_while_another_stream_uses_it_is_not_given_out_again() -> None:
    side = torch.cuda.Stream()

    def free(record: bool) -> None:
        x = torch.ones(1000, device="cuda")
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            x + 1
        if record:
            x.record_stream(side)
        del x
        gc.collect()

    torch.cuda.synchronize()
    free(record=True)
    torch.empty(1000, device="cuda")
    free(record=False)
    with pytest.raises(emulated.RaceError, match="record_stream"):
        torch.empty(1000, device="cuda")
    free(record=False)
    torch.cuda.synchronize()
    torch.empty(1000, device="cuda")


def test_events_measure_time_between_points_that_have_passed() -> None:
    begun, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begun.record()
    torch.ones(3, device="cuda")
    ended.record()
    with pytest.raises(RuntimeError, match="not ready"):
        begun.elapsed_time(ended)
    ended.synchronize()
    assert begun.elapsed_time(ended) > 0
    with pytest.raises(ValueError, match="enable_timing"):
        begun.elapsed_time(torch.cuda.Event())


def test_the_current_stream_is_a_threads_own() -> None:
    import threading

    stream, seen = torch.cuda.Stream(priority=-1), []
    with torch.cuda.stream(stream):
        assert torch.cuda.current_stream() == stream
        thread = threading.Thread(target=lambda: seen.append(torch.cuda.current_stream()))
        thread.start()
        thread.join()
        with torch.cuda.stream(None):
            assert torch.cuda.current_stream() == stream
    assert torch.cuda.current_stream() == seen[0] == torch.cuda.default_stream()
    with pytest.raises(RuntimeError, match="less than or equal to 0"):
        torch.cuda.Stream(priority=1)
