"""Every CPU implementation gives the float64 answer for every case of the contract."""

from __future__ import annotations

import sys

import pytest
import torch
from _thorough import some_of
from attention_cases import CASES, Case, build, check, check_far_blocks

from distkv_dask.kernels import IMPLEMENTATIONS, micro_attention, torch_kernel

CPU_IMPLEMENTATIONS = [name for name in IMPLEMENTATIONS if name not in ("reference", "native", "triton")]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
WITH_DTYPES = [(name, dtype) for name in CPU_IMPLEMENTATIONS for dtype in DTYPES]
WITH_DTYPES = [one for one in WITH_DTYPES if "model" not in one[0] or one[1] == torch.bfloat16]
"""AMX tiles compute bfloat16 only; everything else is left to kernels that have their own cases."""
LIKE_OTHERS = {("numba", torch.float16)}
if "native:amx_model_avx512" in CPU_IMPLEMENTATIONS:  # the same source with other vectors
    LIKE_OTHERS.add(("native:amx_model", torch.bfloat16))
LONG = next(case for case in CASES if case.name == "decode-long-split-over-threads")


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(("implementation", "dtype"), some_of(WITH_DTYPES, *{*WITH_DTYPES} - LIKE_OTHERS))
def test_attention_equals_float64(implementation: str, case: Case, dtype: torch.dtype) -> None:
    check(implementation, case, dtype)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_torch_kernel_merges_its_pieces(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_kernel, "PIECE_BYTES", 8 * case.block_tokens * case.kv_heads * case.d)
    check("torch", case, torch.float32)


@pytest.mark.parametrize("implementation", CPU_IMPLEMENTATIONS)
def test_questions_that_share_blocks_may_be_stacked_or_separate_rows(implementation: str) -> None:
    arguments = build(LONG, torch.float32)
    questions = torch.randn(5, *arguments["q"].shape[1:])
    stacked = arguments | {"q": questions, "query_offsets": torch.tensor([0, 5], dtype=torch.int32)}
    separate = arguments | {
        "q": questions,
        "block_tables": arguments["block_tables"].repeat(5, 1),
        "lengths": arguments["lengths"].repeat(5),
    }
    expected = micro_attention(**stacked, implementation="reference")
    for form in (stacked, separate):
        out, lse = micro_attention(**form, implementation=implementation)
        torch.testing.assert_close(out, expected[0], rtol=0, atol=1e-6)
        torch.testing.assert_close(lse, expected[1], rtol=0, atol=2e-6)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux reserves memory without using it")
@pytest.mark.parametrize("implementation", CPU_IMPLEMENTATIONS)
def test_pools_of_more_than_two_to_the_31_elements_are_read_right(implementation: str) -> None:
    check_far_blocks(implementation)


@pytest.mark.parametrize("implementation", CPU_IMPLEMENTATIONS)
def test_a_batch_without_rows_is_an_empty_answer(implementation: str) -> None:
    arguments = build(LONG, torch.float32)
    empty = arguments | {name: arguments[name][:0] for name in ("q", "block_tables", "lengths")}
    out, lse = micro_attention(**empty, implementation=implementation)
    assert out.shape == arguments["q"][:0].shape
    assert lse.shape == out.shape[:2]
