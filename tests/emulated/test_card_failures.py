"""How a card's failures affect the worker: some are temporary, others end it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from distkv_dask.errors import DeviceLostError, DeviceMemoryError
from distkv_dask.messages.names import Piece, Transfer
from distkv_dask.worker.blocks.host_tier import HostTier
from distkv_dask.worker.blocks.pool import BlockShape, Pool
from distkv_dask.worker.blocks.transfer import Arrivals
from distkv_dask.worker.card import Card
from distkv_dask.worker.device import Use
from emulated import break_card, mend, run_out


@pytest.fixture(autouse=True)
def mended() -> Iterator[None]:
    yield
    mend()


@pytest.fixture
def gpu() -> Card:
    return Card()


def test_an_error_that_every_later_call_repeats_means_that_the_card_is_lost(gpu: Card) -> None:
    break_card(after=2)
    with pytest.raises(DeviceLostError, match=r"Emulated GPU failed: AcceleratorError: CUDA error: an illegal memory"):
        work(gpu, 4)
    assert "an illegal memory access" in gpu.lost
    with pytest.raises(torch.AcceleratorError):
        torch.zeros(1, device="cuda")


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB."),
        torch.AcceleratorError("CUDA error: out of memory"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_too_little_memory_passes(gpu: Card, error: RuntimeError) -> None:
    with pytest.raises(DeviceMemoryError, match=r"ran out of memory in a step, with \d+ of \d+ bytes free"):
        fail(gpu, error)
    assert not gpu.lost
    work(gpu, 4)


def test_memory_that_others_need_is_given_back_when_there_is_too_little(gpu: Card) -> None:
    kept = torch.empty(8 << 20, dtype=torch.uint8, device="cuda")
    del kept
    free, _ = torch.cuda.mem_get_info()
    run_out(times=1)
    with pytest.raises(DeviceMemoryError):
        work(gpu, 1)
    assert torch.cuda.mem_get_info()[0] > free


@pytest.mark.parametrize("error", [RuntimeError("CUDA error: invalid configuration argument"), ValueError("of ours")])
def test_other_errors_of_a_card_that_still_answers_stay_as_they_are(gpu: Card, error: Exception) -> None:
    with pytest.raises(type(error), match=str(error)):
        fail(gpu, error)
    assert not gpu.lost


@pytest.mark.parametrize("use", ["a piece arrives", "blocks are read", "blocks go to host memory"])
def test_a_card_that_breaks_as_blocks_are_copied_is_found_lost(gpu: Card, use: str) -> None:
    pool = Pool(BlockShape(1, 1, 4, "float32", 4), 8, gpu)
    arrivals, tier = Arrivals(pool), HostTier(pool, 4 * pool.block_bytes)
    arrivals.expect(Transfer("move", 1), 7, 0, 8)
    uses: dict[str, Callable[[], object]] = {
        "a piece arrives": lambda: arrivals.store_piece(
            Piece(Transfer("move", 1), 0, 0, False), np.zeros(pool.block_bytes, np.uint8)
        ),
        "blocks are read": lambda: pool.read([0, 1]),
        "blocks go to host memory": lambda: tier.store("a", [0, 1]),
    }
    break_card()
    with pytest.raises(DeviceLostError):
        uses[use]()
    assert gpu.lost
    assert "a" not in tier


def work(gpu: Card, launches: int) -> None:
    with gpu.stream(Use.HOME):
        for _ in range(launches):
            torch.zeros(1000, device="cuda")


def fail(gpu: Card, error: Exception) -> None:
    with gpu.stream(Use.HOLDER):
        raise error
