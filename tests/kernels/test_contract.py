"""Every CPU implementation gives the float64 answer, on every case of the contract."""

from __future__ import annotations

import pytest
import torch
from attention_cases import CASES, Case, check

from distkv_dask.kernels import IMPLEMENTATIONS

CPU_IMPLEMENTATIONS = [name for name in IMPLEMENTATIONS if name not in ("reference", "native", "triton")]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("implementation", CPU_IMPLEMENTATIONS)
def test_attention_equals_float64(implementation: str, case: Case, dtype: torch.dtype) -> None:
    check(implementation, case, dtype)
