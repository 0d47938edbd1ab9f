"""The engine's tests on the card: with torch's kernels, because Triton's interpreter would take hours."""

from __future__ import annotations

import os


def use_torch_kernels() -> None:
    """Have pools on the card served by torch from now on, in this process; not with ``DISTKV_TEST_KERNEL=triton``."""
    from distkv_dask.kernels import dispatch, triton_kernel

    if os.environ.get("DISTKV_TEST_KERNEL") != "triton":
        triton_kernel.unsupported = lambda *case: "Triton's interpreter is slow"
        dispatch.choose.cache_clear()
