"""Counts of a program's operations on a card, by kind and by the line of the project that asked for them."""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Literal, NamedTuple

Kind = Literal["launch", "sync", "h2d", "d2h", "alloc", "replay"]
"""A kernel launch; a wait of the host; a copy from host to device, and one back; an allocation; a graph replay."""

_KIT = Path(__file__).parent
_ROOT = _KIT.parents[1]


class Entry(NamedTuple):
    """The key of a count."""

    kind: Kind
    name: str
    place: str
    thread: str


class Counts:
    """Counts of all threads since :func:`counting` began."""

    def __init__(self) -> None:
        self.number: Counter[Entry] = Counter()
        self.bytes: Counter[Entry] = Counter()
        self.variants: Counter[tuple[str, object]] = Counter()
        """Launches of Triton kernels by name and by properties for which the compiler makes variants."""

    def of(self, kind: Kind, name: str | None = None) -> int:
        """Number of operations of this kind, or of this kind and name."""
        return sum(n for entry, n in self.number.items() if entry.kind == kind and name in (None, entry.name))

    def bytes_of(self, kind: Kind) -> int:
        """Bytes of copies or allocations."""
        return sum(n for entry, n in self.bytes.items() if entry.kind == kind)

    def places(self, kind: Kind) -> Counter[str]:
        """Numbers of operations by file and line."""
        found: Counter[str] = Counter()
        for entry, n in self.number.items():
            if entry.kind == kind:
                found[entry.place] += n
        return found

    def table(self) -> str:
        """All counts as text, the most frequent first."""
        rows = sorted(self.number.items(), key=lambda row: (row[0].kind, -row[1]))
        lines = (
            f"{entry.kind:7}{n:6}{self.bytes[entry]:12} B  {entry.name:32} {entry.place} [{entry.thread}]"
            for entry, n in rows
        )
        return "\n".join(lines)


_active: list[Counts] = []
_lock = threading.Lock()


@contextmanager
def counting() -> Iterator[Counts]:
    """Count operations of all threads of this process inside the ``with`` statement."""
    counts = Counts()
    with _lock:
        _active.append(counts)
    try:
        yield counts
    finally:
        with _lock:
            _active.remove(counts)


def note(kind: Kind, name: str, nbytes: int = 0, variant: object = None) -> None:
    """Count an operation in all active counts."""
    if not _active:
        return
    entry = Entry(kind, name, place(), threading.current_thread().name)
    with _lock:
        for counts in _active:
            counts.number[entry] += 1
            counts.bytes[entry] += nbytes
            if variant is not None:
                counts.variants[name, variant] += 1


def place() -> str:
    """File and line of the innermost frame of the project."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        name = _project_file(frame.f_code.co_filename)
        if name:
            return f"{name}:{frame.f_lineno}"
        frame = frame.f_back
    return "?"


@cache
def _project_file(filename: str) -> str:
    """Path of a file within the project; empty for other files, and for those of the emulation itself."""
    path = Path(filename)
    if path.parent == _KIT and not path.name.startswith("test_"):
        return ""
    if not path.is_relative_to(_ROOT) or "site-packages" in path.parts:
        return ""
    return str(path.relative_to(_ROOT))
