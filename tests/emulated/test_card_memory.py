"""The card's memory: what tensors allocate and free, and that the card's size is a limit."""

from __future__ import annotations

import gc

import pytest
import torch

from emulated.memory import card

MIB = 1 << 20


@pytest.fixture(autouse=True)
def clean() -> None:
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def test_storages_are_counted_once_and_freed_with_their_last_view() -> None:
    before = torch.cuda.memory_allocated()
    x = torch.zeros(MIB, device="cuda")
    views = [x[1:], x.view(2, -1)]
    assert torch.cuda.memory_allocated() - before == 4 * MIB
    del x
    assert torch.cuda.memory_allocated() - before == 4 * MIB
    views.clear()
    assert torch.cuda.memory_allocated() == before
    assert torch.cuda.max_memory_allocated() - before == 4 * MIB
    torch.cuda.reset_peak_memory_stats()
    assert torch.cuda.max_memory_allocated() == before


def test_freed_memory_stays_with_the_allocator_until_its_cache_is_emptied() -> None:
    free, total = torch.cuda.mem_get_info()
    x = torch.zeros(4 * MIB, device="cuda")
    assert torch.cuda.mem_get_info() == (free - 16 * MIB, total)
    del x
    assert torch.cuda.mem_get_info() == (free - 16 * MIB, total)
    torch.cuda.empty_cache()
    assert torch.cuda.mem_get_info() == (free, total)


@pytest.mark.parametrize("make", [torch.zeros, torch.empty, torch.ones])
def test_more_than_the_card_has_is_refused_and_takes_nothing(make) -> None:
    before, total = torch.cuda.memory_allocated(), card().ours
    with pytest.raises(torch.cuda.OutOfMemoryError, match="CUDA out of memory"):
        make(total, dtype=torch.float32, device="cuda")
    assert torch.cuda.memory_allocated() == before
    half = torch.empty(total // 2 + 1, dtype=torch.uint8, device="cuda")
    with pytest.raises(torch.cuda.OutOfMemoryError):
        torch.empty_like(half)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        half + 1
