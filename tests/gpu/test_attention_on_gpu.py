"""On a real GPU, the Triton kernels (and torch's operations) give the float64 answer for every case of the contract."""

from __future__ import annotations

import pytest
import torch
from attention_cases import CASES, Case, build, check, named
from triton_cases import CUT, INDEX, check_layers, check_merges, check_prepared, prepare, served_by_triton

from distkv_dask.kernels import choose, make_ready, micro_attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: torch.cuda.is_available() is False"),
]

SOME = CASES if torch.cuda.is_available() else CASES[:1]
"""One skipped case is enough without a GPU, instead of hundreds."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", SOME, ids=str)
@pytest.mark.parametrize("implementation", ["triton", "torch"])
def test_attention_equals_float64(implementation: str, case: Case, dtype: torch.dtype) -> None:
    check(implementation, case, dtype, device="cuda")


def test_triton_serves_gpu_pools() -> None:
    assert choose("cuda", torch.bfloat16, 128, 64).name == "triton"


def test_bad_block_ids_raise_instead_of_reading_other_memory() -> None:
    pool = torch.zeros(4, 2, 16, 64, dtype=torch.bfloat16, device="cuda")
    q = torch.zeros(1, 4, 64, dtype=torch.bfloat16, device="cuda")
    tables = torch.tensor([[9]], dtype=torch.int32, device="cuda")
    lengths = torch.tensor([3], dtype=torch.int32, device="cuda")
    with pytest.raises(ValueError, match="block_tables"):
        micro_attention(q, pool, pool, tables, lengths, scale=1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [*CUT, named("shared-prefix-of-16-questions")], ids=str)
def test_steps_of_a_prepared_batch_equal_float64(case: Case, dtype: torch.dtype) -> None:
    check_prepared(case, dtype, device="cuda")


def test_new_kv_is_stored_and_seen_in_every_layer() -> None:
    check_layers("cuda")


def test_partials_of_all_holders_merge_to_the_softmax_over_them() -> None:
    check_merges("cuda")


def test_a_captured_layer_serves_later_steps_and_nothing_waits() -> None:
    arguments = build(CUT[0], torch.bfloat16, device="cuda")
    index = {name: arguments[name].cpu() for name in INDEX if name in arguments}
    given = [arguments[name] for name in ("q", "k_pool", "v_pool", "scale")]
    make_ready(arguments["k_pool"], arguments["v_pool"], arguments["q"].shape[1])
    with served_by_triton():
        attention = prepare(arguments, index)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        attention(*given)
    index["lengths"].copy_((index["lengths"] * 0.5).int())
    torch.cuda.set_sync_debug_mode("error")
    try:
        attention.refresh()
        graph.replay()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    out, _ = micro_attention(**arguments | {"lengths": index["lengths"].cuda()}, implementation="reference")
    torch.testing.assert_close(attention.out, out, rtol=0, atol=6e-3)
