"""Triton's kernels run on the emulated card in the interpreter: counted, with every address checked, one at a time."""

from __future__ import annotations

import threading

import emulated
import pytest
import torch
import triton
from torch import Tensor
from triton import language as tl


@triton.jit
def scale(x, y, n, factor, SIZE: tl.constexpr):
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(y + at, tl.load(x + at, mask=at < n) * factor, mask=at < n)


@triton.jit
def scale_all(x, y, SIZE: tl.constexpr):
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(y + at, tl.load(x + at) * 2)


@triton.jit
def product(a, b, c, N: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(c + at, tl.dot(tl.load(a + at), tl.load(b + at)))


@triton.jit
def add_up(x, total, SIZE: tl.constexpr):
    tl.atomic_add(total, tl.sum(tl.load(x + tl.arange(0, SIZE))))


def ones(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(*shape, dtype=dtype, device="cuda")


def test_kernels_compute_and_are_counted() -> None:
    x, y, total = ones(70), torch.zeros(70, device="cuda"), torch.zeros(1, device="cuda")
    with emulated.counting() as counts:
        scale[(3,)](x, y, 70, 3.0, SIZE=32)
        add_up[(1,)](y, total, SIZE=64)
    assert counts.of("launch", "scale") == counts.of("launch", "add_up") == counts.of("launch") / 2 == 1
    assert (y.tolist(), total.item()) == ([3] * 70, 192)


def test_bfloat16_is_multiplied() -> None:
    a, b = (torch.randn(16, 16).bfloat16() for _ in range(2))
    c = torch.empty(16, 16, device="cuda")
    product[(1,)](a.cuda(), b.cuda(), c, N=16)
    torch.testing.assert_close(c.cpu(), a.float() @ b.float())


def test_variants_are_what_the_compiler_would_make() -> None:
    x, y = ones(64), ones(64)

    def variants(*calls: tuple[object, ...], **options: object) -> int:
        with emulated.counting() as counts:
            for tensor, n, factor, size in calls:
                scale[(1,)](tensor, y, n, factor, SIZE=size, **options)
        return len(counts.variants)

    assert variants((x, 17, 2.0, 8), (x, 18, 3.0, 8)) == 1
    assert variants((x, 17, 2.0, 8), (x, 1, 2.0, 8), (x, 32, 2.0, 8), (x, 17, 2.0, 16)) == 4
    assert variants((x, 17, 2.0, 8), (x[1:], 17, 2.0, 8), (x[4:], 18, 2.0, 8), (x.bfloat16(), 17, 2.0, 8)) == 3


def test_host_pointers_are_refused() -> None:
    with pytest.raises(ValueError, match="cpu tensor"):
        scale[(1,)](torch.ones(8), ones(8), 8, 1.0, SIZE=8)
    with pytest.raises(ValueError, match="cpu tensor"):
        scale[(1,)](torch.ones(8), torch.ones(8), 8, 1.0, SIZE=8)


def test_addresses_outside_of_the_arguments_are_refused() -> None:
    with pytest.raises(Exception, match="illegal memory access"):
        scale_all[(3,)](ones(70), ones(96), SIZE=32)
    with pytest.raises(Exception, match="illegal memory access"):
        scale_all[(3,)](ones(96), ones(70), SIZE=32)


def test_races_are_seen_by_the_bytes_that_a_kernel_touches() -> None:
    x, y = ones(128), ones(128)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        scale[(2,)](x, y, 64, 2.0, SIZE=32)
    y[64:].sum()
    with pytest.raises(emulated.RaceError, match=r"written on stream .* by scale"):
        y[:64].sum()
    with pytest.raises(emulated.RaceError, match=r"scale .* writes memory"):
        scale[(1,)](x, x, 64, 2.0, SIZE=32)
    torch.cuda.current_stream().wait_stream(side)
    assert y.sum().item() == 192


def test_threads_launch_one_after_the_other() -> None:
    x = ones(256)
    made = [torch.zeros(256, device="cuda") for _ in range(4)]
    threads = [threading.Thread(target=lambda y=y: scale[(8,)](x, y, 256, 2.0, SIZE=32)) for y in made]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(y.sum().item() == 512 for y in made)
