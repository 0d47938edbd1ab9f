"""Lets the C library keep memory that a forward frees for the next one.

Dask's nannies start workers with ``MALLOC_TRIM_THRESHOLD_=65536`` (``distributed.nanny.pre-spawn-environ``), so that
memory freed by tasks returns to the operating system. With glibc this also fixes the size from which each allocation is
a separate mapping at 128 KiB. A forward allocates and frees larger tensors in every layer, and the kernel has to clear
their pages each time: that was a third of prefill's time (man 3 mallopt).
"""

from __future__ import annotations

import ctypes
import os

MAPPED = 32 << 20
"""Bytes from which an allocation is a separate mapping: the largest value that every glibc accepts."""
KEPT = 256 << 20
"""Free bytes at the end of the heap that are not returned to the operating system."""
USUAL = 128 << 10
"""The default of the same in glibc."""
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3


def keep_freed_memory() -> bool:
    """Let this process keep memory that a forward frees; False if the C library is not glibc. Can be repeated."""
    return _set(_MMAP_THRESHOLD, MAPPED) and _set(_TRIM_THRESHOLD, KEPT)


def give_back_freed_memory() -> None:
    """Return free memory to the operating system now, and from now on if the environment requests it.

    Free memory between used memory is returned only once: later allocations of any size may reuse it.
    """
    trim, mapped = (os.environ.get(f"MALLOC_{name}_THRESHOLD_", "") for name in ("TRIM", "MMAP"))
    if trim.isdecimal():
        _set(_TRIM_THRESHOLD, int(trim))
        _set(_MMAP_THRESHOLD, int(mapped) if mapped.isdecimal() else USUAL)
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)


def _set(option: int, value: int) -> bool:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(option, value))
