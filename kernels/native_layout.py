"""Structures that Python and C++ share through ctypes: both define the offset of each field, and must agree.

A field that moved on one side only would corrupt memory in the middle of an answer, so such a library is refused when
it is loaded.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence

Layout = Sequence[int]
"""Bytes of a structure, then the offset of each field in order."""


def layout_of(structure: type[ctypes.Structure]) -> Layout:
    """Size and offsets of a structure in Python.

    Examples
    --------
    >>> class Pair(ctypes.Structure):
    ...     _fields_ = (("first", ctypes.c_int8), ("second", ctypes.c_int64))
    >>> layout_of(Pair)
    [16, 0, 8]
    """
    offsets = [int(getattr(structure, name).offset) for name, *_ in structure._fields_]
    return [ctypes.sizeof(structure), *offsets]


def disagreement(library: ctypes.CDLL, layouts: Mapping[str, Layout]) -> str | None:
    """Describe the first structure with another layout in a library, or return None.

    Parameters
    ----------
    library
        The library, which exports ``distkv_layout_NAME`` for each name (``DISTKV_LAYOUT`` in exports.h).
    layouts
        Python's layouts, by name.
    """
    for name, expected in layouts.items():
        try:
            export = getattr(library, f"distkv_layout_{name}")
        except AttributeError:
            return f"it does not describe its structure {name!r}"
        export.restype = ctypes.POINTER(ctypes.c_int64)
        there = export()
        found: list[int] = []
        while there[len(found)] != -1:
            found.append(there[len(found)])
        if found != list(expected):
            return f"its structure {name!r} has size and offsets {found}, but Python's has {list(expected)}"
    return None
