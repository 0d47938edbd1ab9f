"""The C++ half of an exchange (worker/native), loaded through ctypes: on plain sockets, layers need no Python.

ctypes releases the interpreter lock during a call, so a holder answers while its own home lane runs Python. If the
library or the kernels' core is missing, and on channels other than plain sockets, Python does the same.
"""

from __future__ import annotations

import ctypes
import logging
import sys
from functools import lru_cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

from distkv_dask.kernels import native_kernel
from distkv_dask.kernels.native_layout import disagreement, layout_of
from distkv_dask.worker.native.structs import Holder, Home, Mark, Marks, Session

logger = logging.getLogger("distributed.distkv.wire")

STRUCTURES = {"holder": Holder, "home": Home, "session": Session, "mark": Mark, "marks": Marks}
"""Python's structures, by their names in the library."""


@lru_cache(maxsize=1)
def wire() -> ctypes.CDLL | None:
    """The library, or None if it was not built, was built from another version, or has no kernels to call."""
    if native_kernel.missing() is not None or sys.byteorder != "little":
        return None
    for suffix in EXTENSION_SUFFIXES:
        path = Path(__file__).with_name(f"_wire{suffix}")
        if path.exists():
            library = _load(path)
            if isinstance(library, str):
                logger.warning("layers are exchanged in Python: %s %s", path.name, library)
                return None
            return library
    return None


def _load(path: Path) -> ctypes.CDLL | str:
    """The library, or why it cannot be used."""
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return f"does not load: {error}"
    reason = disagreement(library, {name: layout_of(one) for name, one in STRUCTURES.items()})
    if reason is not None:
        return f"was built from another version, {reason}; rebuild it: pip install -e ."
    pointer, whole, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double
    library.distkv_ask.argtypes = [pointer] * 4 + [whole, whole, real]
    library.distkv_gather.argtypes = [pointer, real]
    library.distkv_serve.argtypes = [whole, pointer, whole, pointer, real]
    library.distkv_serve.restype = None
    return library
