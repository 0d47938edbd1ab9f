"""What an engine asks when it opens, so that no request finds out."""

from __future__ import annotations

import pytest

from distkv_dask.errors import UnsupportedModelError
from distkv_dask.worker.blocks.pool import BlockShape, Pool
from distkv_dask.worker.startup import check_kernels


@pytest.mark.parametrize(("kv_heads", "head_dim", "heads"), [(2, 12, 4), (2, 20, 4), (3, 16, 4)])
def test_heads_that_kernels_do_not_take_are_refused_when_an_engine_opens(
    kv_heads: int, head_dim: int, heads: int
) -> None:
    pool = Pool(BlockShape(2, kv_heads, head_dim, "float32", 8), 1)
    with pytest.raises(UnsupportedModelError, match="heads that kernels do not take"):
        check_kernels(pool, heads)


@pytest.mark.parametrize(("kv_heads", "head_dim", "heads"), [(2, 8, 4), (1, 100 + 4, 7), (2, 576, 4)])
def test_heads_that_kernels_take_pass(kv_heads: int, head_dim: int, heads: int) -> None:
    check_kernels(Pool(BlockShape(2, kv_heads, head_dim, "bfloat16", 8), 1), heads)
