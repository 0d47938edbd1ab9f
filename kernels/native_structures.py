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
    """The objects behind the pointers, kept alive."""


class PackedLinear(ctypes.Structure):
    """distkv::Linear in native/linear.h."""

    _fields_ = (
        ("weight", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("inputs", ctypes.c_int64),
        ("outputs", ctypes.c_int64),
        ("threads", ctypes.c_int64),
    )


class PackedDecoderLayer(ctypes.Structure):
    """distkv::DecoderLayer in native/decoder_layer.h."""

    _fields_ = (
        ("query", ctypes.c_void_p),
        ("key", ctypes.c_void_p),
        ("value", ctypes.c_void_p),
        ("output", ctypes.c_void_p),
        ("gate", ctypes.c_void_p),
        ("up", ctypes.c_void_p),
        ("down", ctypes.c_void_p),
        ("norm", ctypes.c_void_p),
        ("mlp_norm", ctypes.c_void_p),
        ("query_norm", ctypes.c_void_p),
        ("key_norm", ctypes.c_void_p),
        ("size", ctypes.c_int64),
        ("middle", ctypes.c_int64),
        ("heads", ctypes.c_int64),
        ("kv_heads", ctypes.c_int64),
        ("head_dim", ctypes.c_int64),
        ("threads", ctypes.c_int64),
        ("epsilon", ctypes.c_double),
        ("mlp_epsilon", ctypes.c_double),
        ("head_epsilon", ctypes.c_double),
    )
