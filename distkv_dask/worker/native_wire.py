"""The C++ half of an exchange (worker/native), loaded through ctypes: a layer without Python on plain sockets.

ctypes releases the interpreter lock during a call, so a holder answers while its own home lane runs Python. Where the
library or the kernels' core is missing, and on channels that are no plain sockets, Python does the same.
"""

from __future__ import annotations

import ctypes
import sys
from functools import lru_cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

from distkv_dask.kernels import native_kernel
from distkv_dask.worker.channels.frames import HEADER_BYTES

HeaderBytes = ctypes.c_uint8 * HEADER_BYTES
"""A frame's header within a structure."""


@lru_cache(maxsize=1)
def wire() -> ctypes.CDLL | None:
    """The library, or None where it was not built or has no kernels to call."""
    if native_kernel.missing() is not None or sys.byteorder != "little":
        return None
    for suffix in EXTENSION_SUFFIXES:
        path = Path(__file__).with_name(f"_wire{suffix}")
        if path.exists():
            try:
                library = ctypes.CDLL(str(path))
            except OSError:
                return None
            pointer, whole, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double
            library.distkv_ask.argtypes = [pointer] * 4 + [whole, whole, real]
            library.distkv_gather.argtypes = [pointer, real]
            library.distkv_serve.argtypes = [whole, pointer, whole, pointer, real]
            library.distkv_serve.restype = None
            return library
    return None
