"""Instruction sets of the C++ core: the choice depends on times only, and serves calls that name no set."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from attention_cases import build, named

from distkv_dask.kernels import micro_attention, native_kernel
from distkv_dask.kernels.instruction_sets import SetTimes, time_sets

BUILT = native_kernel.missing() is None
core = pytest.mark.skipif(not BUILT, reason="no C++ core here")
DECODE, PREFILL = named("decode-long-split-over-threads"), named("prefill-head-dim-128")
TIMES = SetTimes(
    few={"avx512_bf16": (1.0, 1.01), "avx512": (0.99, 1.0), "avx2": (2.0, 9.0)},
    many={"avx512_bf16": (1.0, 1.01), "avx512": (0.6, 0.61), "avx2": (1.2, 1.21)},
    few_bytes=20 * 10**9,
    many_flop=180 * 10**9,
)


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    yield
    for dtype in (torch.bfloat16, torch.float32) if BUILT else ():
        native_kernel.serve_with(dtype, few="", many="")


def test_each_kind_of_work_gets_what_is_clearly_fastest_there() -> None:
    assert TIMES.fastest() == ("avx512_bf16", "avx512"), "a hundredth is noise, by which hosts would differ"
    assert str(TIMES) == (
        "measured on one thread: decode avx512_bf16 20.0, avx512 20.2, avx2 10.0 GB/s; "
        "prefill avx512_bf16 180, avx512 300, avx2 150 GFLOP/s"
    )


@pytest.mark.parametrize(("second", "settled"), [(1.04, True), (1.2, False)])
def test_times_of_contenders_that_did_not_come_twice_are_not_settled(second: float, settled: bool) -> None:
    assert replace(TIMES, few=dict(TIMES.few) | {"avx512": (0.99, 0.99 * second)}).settled is settled


@core
def test_earlier_times_stay_where_they_were_better() -> None:
    sets = native_kernel.instruction_sets()
    known = SetTimes(dict.fromkeys(sets, (1e-9, 60.0)), dict.fromkeys(sets, (60.0, 60.0)), 1, 1)
    found = time_sets(torch.bfloat16, known)
    assert all(best == 1e-9 and second < 60.0 for best, second in found.few.values())
    assert all(best <= second < 60.0 for best, second in found.many.values())
    for times, many in ((found.few, False), (found.many, True)):
        timed = {*native_kernel.instruction_sets(torch.bfloat16, many=many)}
        assert {*times} == (timed - {"portable"} or timed), "a set that leaves such work to another is not timed"


@core
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int8])
def test_every_dtype_is_timed(dtype: torch.dtype) -> None:
    found = time_sets(dtype)
    assert all(0 < best <= second for times in (found.few, found.many) for best, second in times.values())
    assert found.few_bytes == 64 << 20


@core
@pytest.mark.parametrize("few", native_kernel.instruction_sets(torch.bfloat16, many=False) if BUILT else [])
def test_what_was_chosen_for_few_and_for_many_queries_serves_them(few: str) -> None:
    dtype, (first, *_, last) = torch.bfloat16, native_kernel.instruction_sets(torch.float32)
    native_kernel.serve_with(dtype, few=few, many=last)
    assert native_kernel.serving(dtype) == (few, last)
    assert native_kernel.serving(torch.float32) == (first, first), "other dtypes have a choice of their own"
    for case, isa in ((DECODE, few), (PREFILL, last)):
        arguments = build(case, dtype)
        out, lse = micro_attention(**arguments)
        expected = micro_attention(**arguments, implementation=f"native:{isa}")
        assert torch.equal(out, expected[0])
        assert torch.equal(lse, expected[1])


@core
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_set_leaves_work_that_it_does_not_do_to_the_first_that_does(dtype: torch.dtype) -> None:
    first = native_kernel.instruction_sets()[0]
    native_kernel.serve_with(dtype, few=first, many=first)
    does = [native_kernel.instruction_sets(dtype, many=many) for many in (False, True)]
    assert native_kernel.serving(dtype) == tuple(names[0] for names in does)


@core
def test_an_unknown_instruction_set_changes_nothing_and_is_told_with_those_that_there_are() -> None:
    before = native_kernel.serving(torch.bfloat16)
    with pytest.raises(ValueError, match=r"instruction set: expected one of \[.*'portable'.*\], got 'mmx'"):
        native_kernel.serve_with(torch.bfloat16, few=before[0], many="mmx")
    assert native_kernel.serving(torch.bfloat16) == before
