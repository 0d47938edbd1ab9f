"""Files mapped in this process, from the operating system (Linux only)."""

from __future__ import annotations

import ctypes
import mmap
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

_MAPS = Path("/proc/self/maps")


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a file that is mapped: addresses from ``start`` to ``stop`` are the file's bytes from ``offset`` on."""

    start: int
    stop: int
    offset: int
    path: str


class FileMaps:
    """The files that are mapped now."""

    def __init__(self) -> None:
        lines = _MAPS.read_text().splitlines() if _MAPS.exists() else []
        self._parts = sorted((part for line in lines if (part := _read(line))), key=lambda part: part.start)
        self._starts = [part.start for part in self._parts]

    @property
    def are_known(self) -> bool:
        """Whether the operating system reports mapped files."""
        return bool(self._parts)

    def of(self, tensor: Tensor) -> Part | None:
        """The part of a file that holds all of a contiguous tensor; None where it is in memory of this process."""
        at = bisect_right(self._starts, tensor.data_ptr()) - 1
        if at < 0 or tensor.data_ptr() + tensor.nbytes > self._parts[at].stop:
            return None
        return self._parts[at]


def forget_pages(weights: Iterable[Tensor]) -> None:
    """Give back memory of mapped weights that nobody reads any more (who does, reads their file again).

    Loading reads a little of every weight, for which the operating system maps many pages around.
    """
    maps, madvise = FileMaps(), None
    for weight in weights:
        if maps.of(weight) is None:
            continue
        start = -(-weight.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        size = (weight.data_ptr() + weight.nbytes - start) // mmap.PAGESIZE * mmap.PAGESIZE
        if size > 0:
            if madvise is None:
                madvise = ctypes.CDLL(None).madvise
                madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
            madvise(start, size, mmap.MADV_DONTNEED)


def _read(line: str) -> Part | None:
    fields = line.split(maxsplit=5)
    if len(fields) < 6 or not fields[5].startswith("/"):
        return None
    start, stop = (int(one, 16) for one in fields[0].split("-"))
    return Part(start, stop, int(fields[2], 16), fields[5])
