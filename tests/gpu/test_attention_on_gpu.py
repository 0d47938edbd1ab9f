"""On a real GPU, the Triton kernels (and torch's operations) give the float64 answer on every case of the contract."""

from __future__ import annotations

import pytest
import torch
from attention_cases import CASES, Case, check

from distkv_dask.kernels import choose, micro_attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: torch.cuda.is_available() is False"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
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
