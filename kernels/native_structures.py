"""Structures of the C++ core that Python fills in; their layouts are compared when the core is loaded."""

from __future__ import annotations

import ctypes
from typing import Any


class PackedLayers(ctypes.Structure):
    """distkv::Layers in native/layers.cpp."""

    _fields_ = (
        ("args", ctypes.c_void_p),
        ("k", ctypes.c_void_p),
        ("v", ctypes.c_void_p),
        ("layers", ctypes.c_int64),
        ("blocks", ctypes.c_void_p),
        ("offsets", ctypes.c_void_p),
        ("appended", ctypes.c_int64),
    )
    kept: Any
    """What the pointers point to."""


class PackedLinear(ctypes.Structure):
    """distkv::Linear in native/linear.h."""

    _fields_ = (
        ("weight", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("inputs", ctypes.c_int64),
        ("outputs", ctypes.c_int64),
        ("threads", ctypes.c_int64),
    )
