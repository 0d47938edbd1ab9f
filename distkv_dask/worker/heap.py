"""What the C library does with memory that a forward frees: keep it for the next one.

Dask's nannies start workers with ``MALLOC_TRIM_THRESHOLD_=65536`` (``distributed.nanny.pre-spawn-environ``), so that
what tasks have freed goes back to the operating system. With glibc that also fixes the size from which each allocation
is a mapping of its own at 128 KiB. A forward allocates and frees larger tensors in every layer, and the kernel has to
clear their pages each time: that was a third of prefill's time (man 3 mallopt).
"""

from __future__ import annotations

import ctypes
import os

MAPPED = 32 << 20
"""Bytes from which an allocation is a mapping of its own: the most that every glibc accepts."""
KEPT = 256 << 20
"""Bytes that may lie free at the end of the heap before they go back to the operating system."""
USUAL = 128 << 10
"""The same where nothing is said, in glibc."""
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3


def keep_freed_memory() -> bool:
    """Let this process keep what a forward frees; False where the C library is not glibc. Can be called again."""
    return _set(_MMAP_THRESHOLD, MAPPED) and _set(_TRIM_THRESHOLD, KEPT)


def give_back_freed_memory() -> None:
    """Give free memory back to the operating system, and do so from now on where the environment asks for it.

    What is free between what is in use is given back once: allocations that fit go there, whatever their size.
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
