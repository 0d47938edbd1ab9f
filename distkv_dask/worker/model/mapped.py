"""Files mapped in this process, from the operating system (Linux only)."""

from __future__ import annotations

import ctypes
import mmap
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

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
        """The part of a file that holds all of a contiguous tensor; None if it is in memory of this process."""
        at = bisect_right(self._starts, tensor.data_ptr()) - 1
        if at < 0 or tensor.data_ptr() + tensor.nbytes > self._parts[at].stop:
            return None
        return self._parts[at]


class MappedPages:
    """The pages of files from which a model's weights are mapped now; pages that were read can be released.

    Parameters
    ----------
    model
        A model; weights that are not mapped from files are left alone.
    """

    def __init__(self, model: nn.Module) -> None:
        maps = FileMaps()
        mapped = [weight for weight in model.parameters() if maps.of(weight) is not None]
        self._whole = {id(weight): _whole_pages(weight) for weight in mapped}
        self._madvise = ctypes.CDLL(None).madvise if mapped else None

    def drop_pages(self, weights: Iterable[Tensor]) -> None:
        """Release pages of mapped weights: the next read gets them from the operating system's cache.

        Reading a little of a weight is enough for the operating system to map many pages around it.
        """
        for weight in weights:
            start, size = self._whole.get(id(weight), (0, 0))
            if size > 0 and self._madvise is not None:
                self._madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), mmap.MADV_DONTNEED)


@contextmanager
def few_pages(model: nn.Module) -> Iterator[Callable[[Iterable[Tensor]], None]]:
    """Keep little more than one layer of a model's mapped weights in memory, while all of them are read.

    Parameters
    ----------
    model
        A model. Whenever one of its modules has computed, the pages of the module's own weights are released; at the
        end, those of all weights.

    Yields
    ------
    Callable
        Releases pages of weights that were read outside of modules.
    """
    pages, weights = MappedPages(model), [*model.parameters()]

    def computed(module: nn.Module, *_: Any) -> None:
        pages.drop_pages(module.parameters(recurse=False))

    hooks = [module.register_forward_hook(computed) for module in model.modules() if [*module.parameters(False)]]
    try:
        yield pages.drop_pages
    finally:
        for hook in hooks:
            hook.remove()
        pages.drop_pages(weights)


def _whole_pages(weight: Tensor) -> tuple[int, int]:
    """First address of the pages that a weight fills, and their bytes."""
    start = -(-weight.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    return start, (weight.data_ptr() + weight.nbytes - start) // mmap.PAGESIZE * mmap.PAGESIZE


def _read(line: str) -> Part | None:
    fields = line.split(maxsplit=5)
    if len(fields) < 6 or not fields[5].startswith("/"):
        return None
    start, stop = (int(one, 16) for one in fields[0].split("-"))
    return Part(start, stop, int(fields[2], 16), fields[5])
