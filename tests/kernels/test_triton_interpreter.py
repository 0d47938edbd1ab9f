"""The Triton kernels give the float64 answer in Triton's interpreter, for the cases that every implementation passes.

An environment variable selects the interpreter when Triton is imported, so the test runs in a separate process.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
import torch
from attention_cases import CASES, Case, check, check_far_blocks, named, use_interpreter
from triton_cases import CUT, check_all_variants_are_warm, check_layers, check_merges, check_prepared

pytest.importorskip("triton", reason="triton is not installed: pip install distkv-dask[gpu]")

CHOSEN = [case for case in CASES if case.block_tokens > 1 and case.d <= 256 and sum(case.counts) <= 60]


@pytest.fixture(scope="module")
def interpreter() -> Iterator[ProcessPoolExecutor]:
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, initializer=use_interpreter) as executor:
        yield executor


@pytest.mark.parametrize("case", CHOSEN, ids=str)
def test_triton_equals_float64(interpreter: ProcessPoolExecutor, case: Case) -> None:
    dtype = torch.float16 if case.logits == 1.0 else torch.float32
    interpreter.submit(check, "triton", case, dtype).result()


def test_pools_of_more_than_two_to_the_31_elements_are_read_right(interpreter: ProcessPoolExecutor) -> None:
    interpreter.submit(check_far_blocks, "triton").result()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["decode-ragged-with-an-empty-row", "prefill-causal-after-earlier-tokens"])
def test_triton_equals_float64_in_other_dtypes(interpreter: ProcessPoolExecutor, name: str, dtype: torch.dtype) -> None:
    interpreter.submit(check, "triton", named(name), dtype).result()


@pytest.mark.parametrize("case", [*CUT, named("shared-prefix-of-16-questions")], ids=str)
def test_steps_of_a_prepared_batch_equal_float64(interpreter: ProcessPoolExecutor, case: Case) -> None:
    interpreter.submit(check_prepared, case, torch.float16).result()


def test_new_kv_is_stored_and_seen_in_every_layer(interpreter: ProcessPoolExecutor) -> None:
    interpreter.submit(check_layers).result()


def test_partials_of_all_holders_merge_to_the_softmax_over_them(interpreter: ProcessPoolExecutor) -> None:
    interpreter.submit(check_merges).result()


@pytest.mark.parametrize("kind", [(), (True, 20.0)], ids=["plain", "windows-and-soft-cap"])
def test_nothing_is_compiled_after_an_engine_has_opened(
    interpreter: ProcessPoolExecutor, kind: tuple[Any, ...]
) -> None:
    interpreter.submit(check_all_variants_are_warm, *kind).result()
