"""The kernel of the engine's tests on the card: torch's, because Triton's interpreter would take hours."""

from __future__ import annotations

import os


def use_torch_kernels() -> None:
    """Make torch serve pools on the card from now on in this process, unless ``DISTKV_TEST_KERNEL=triton``."""
    from distkv_dask.kernels import dispatch, triton_kernel

    if os.environ.get("DISTKV_TEST_KERNEL") != "triton":
        triton_kernel.unsupported = lambda *case: "Triton's interpreter is slow"
        dispatch.choose.cache_clear()
