"""Structures of the exchange's C++ code (worker/native), with their layout in Python."""

from __future__ import annotations

import ctypes

from distkv_dask.worker.channels.frames import HEADER_BYTES

HeaderBytes = ctypes.c_uint8 * HEADER_BYTES
"""A frame's header within a structure."""


class Holder(ctypes.Structure):
    """distkv::Holder in native/home.cpp."""

    _fields_ = (
        ("fd", ctypes.c_int64),
        ("q_index", ctypes.c_void_p),
        ("queries", ctypes.c_int64),
        ("q_bytes", ctypes.c_int64),
        ("kv_index", ctypes.c_void_p),
        ("appended", ctypes.c_int64),
        ("kv_bytes", ctypes.c_int64),
        ("packed", ctypes.c_void_p),
        ("answer", ctypes.c_void_p),
        ("answer_bytes", ctypes.c_int64),
        ("part_lse", ctypes.c_void_p),
        ("ask", HeaderBytes),
        ("expected", HeaderBytes),
        ("got", HeaderBytes),
        ("received", ctypes.c_int64),
        ("peer", ctypes.c_int64),
        ("asked", ctypes.c_void_p),
        ("due", ctypes.c_int64),
    )


class Home(ctypes.Structure):
    """distkv::Home in native/home.cpp."""

    _fields_ = (
        ("holders", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("merge", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("lse", ctypes.c_void_p),
        ("tokens", ctypes.c_int64),
        ("heads", ctypes.c_int64),
        ("d", ctypes.c_int64),
        ("local_out", ctypes.c_void_p),
        ("local_lse", ctypes.c_void_p),
        ("runs", ctypes.c_void_p),
        ("run_count", ctypes.c_int64),
        ("sent", ctypes.c_double),
        ("waited", ctypes.c_double),
        ("culprit", ctypes.c_int64),
        ("error", ctypes.c_int64),
        ("bytes_out", ctypes.c_int64),
        ("bytes_in", ctypes.c_int64),
        ("marks", ctypes.c_void_p),
    )


class Session(ctypes.Structure):
    """distkv::Session in native/holder.cpp."""

    _fields_ = (
        ("fd", ctypes.c_int64),
        ("frame", ctypes.c_void_p),
        ("filled", ctypes.c_int64),
        ("frame_bytes", ctypes.c_int64),
        ("batch", ctypes.c_void_p),
        ("q", ctypes.c_void_p),
        ("k", ctypes.c_void_p),
        ("v", ctypes.c_void_p),
        ("answer", ctypes.c_void_p),
        ("answer_bytes", ctypes.c_int64),
        ("layer", ctypes.c_int64),
        ("next", ctypes.c_void_p),
        ("expected", HeaderBytes),
        ("reply", HeaderBytes),
        ("answered", ctypes.c_int64),
        ("busy", ctypes.c_double),
        ("sent", ctypes.c_int64),
        ("status", ctypes.c_int64),
        ("marks", ctypes.c_void_p),
        ("peer", ctypes.c_int64),
    )


class Mark(ctypes.Structure):
    """distkv::Mark in native/marks.h."""

    _fields_ = tuple(
        (name, ctypes.c_int64) for name in ("what", "began", "ended", "gang", "step", "layer", "peer", "size")
    )


class Marks(ctypes.Structure):
    """distkv::Marks in native/marks.h."""

    _fields_ = (
        ("room", ctypes.c_void_p),
        ("capacity", ctypes.c_int64),
        ("count", ctypes.c_int64),
        ("lost", ctypes.c_int64),
        ("last", ctypes.c_int64),
    )
