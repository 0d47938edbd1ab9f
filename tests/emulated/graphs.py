"""CUDA graphs: captured work is executed again, in the same memory, if that still exists."""

from __future__ import annotations

import gc
import itertools
import weakref
from typing import Any

import torch

from emulated.capture import Capture, Mode
from emulated.counts import note
from emulated.errors import CaptureError, StaleGraphError
from emulated.memory import card
from emulated.shadow import Memory, Region
from emulated.streams import DEFAULT, Stream, current_stream, synchronize

Pool = tuple[int, int]
"""Handle of memory that graphs share, only one of which may run at a time."""

_handles = itertools.count(1)
_pools: weakref.WeakValueDictionary[Pool, Memory] = weakref.WeakValueDictionary()
_ALL = Region(0, (1,), (1,), 1)


def graph_pool_handle() -> Pool:
    """A new handle for memory of graphs."""
    return (0, next(_handles))


class MemPool:
    """Memory for graphs, like ``torch.cuda.MemPool``: it remains when no graphs are left."""

    def __init__(self) -> None:
        self.id = graph_pool_handle()
        self._memory = _pools.setdefault(self.id, Memory(1))


class CUDAGraph:
    """Captured work, like ``torch.cuda.CUDAGraph``."""

    def __init__(self, keep_graph: bool = False) -> None:
        self._capture: Capture | None = None
        self._captured = False
        self._pool: Pool = (0, 0)
        self._memory = Memory(1)
        """Stands for the memory that graphs of the pool share."""

    def capture_begin(self, pool: Pool | None = None, capture_error_mode: Mode = "global") -> None:
        """Begin to record the work of the current stream."""
        stream = current_stream()
        if stream == DEFAULT:
            raise CaptureError("CUDA graphs must be captured on a non-default stream.")
        if stream.capture is not None or self._capture is not None:
            raise CaptureError("the stream is being captured already, or the graph was: reset() it first")
        self._pool = graph_pool_handle() if pool is None else pool
        self._memory = _pools.setdefault(self._pool, self._memory)
        self._capture = Capture(capture_error_mode, self._memory)
        self._capture.join(stream)

    def capture_end(self) -> None:
        """End the recording; see :meth:`emulated.capture.Capture.end`."""
        if self._capture is None or current_stream().capture is not self._capture:
            raise CaptureError("the current stream is not being captured by this graph")
        capture, self._capture = self._capture, None
        capture.end()
        self._capture, self._captured = capture, True

    def replay(self) -> None:
        """Execute it again on the current stream, with the current contents of its memory.

        Raises
        ------
        StaleGraphError
            Memory that it uses was freed or moved, or a captured number in host memory has changed.
        """
        capture, stream = self._capture, current_stream()
        if capture is None or not self._captured:
            raise CaptureError("replay() without a preceding successful capture.")
        if stream.capture is not None:
            raise CaptureError("a graph is replayed while its stream is being captured")
        _check(capture)
        note("replay", "graph")
        tick = stream.begin("a graph")
        self._memory.use(_ALL, True, stream, tick)
        for work, what in capture.steps:
            try:
                work.repeat(stream, tick)
            except RuntimeError as error:
                error.add_note(f"in a graph: {what}")
                raise

    def reset(self) -> None:
        """Discard the captured work."""
        self._capture, self._captured = None, False

    def pool(self) -> Pool:
        """The handle of its memory, for graphs that never run at the same time."""
        return self._pool


class graph:
    """``torch.cuda.graph(...)``: work inside the ``with`` statement is captured."""

    def __init__(
        self, cuda_graph: CUDAGraph, pool: Pool | None = None, stream: Stream | None = None,
        capture_error_mode: Mode = "global",
    ) -> None:  # fmt: skip
        self._graph, self._pool, self._mode = cuda_graph, pool, capture_error_mode
        self._stream = stream or Stream()

    def __enter__(self) -> None:
        synchronize()
        gc.collect()
        card().empty_cache()
        with self._stream:
            self._graph.capture_begin(self._pool, self._mode)
        self._stream.__enter__()

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        try:
            self._graph.capture_end()
        except CaptureError:
            if error is None:
                raise
        finally:
            self._stream.__exit__()


def _check(capture: Capture) -> None:
    """Check that memory and numbers are as they were captured."""
    for memory, what in capture.outside.values():
        if memory() is None:
            raise StaleGraphError(f"a graph uses memory that was freed or moved since it was captured: {what}")
    for number, before, what in capture.numbers:
        if not torch.equal(number, before):
            raise StaleGraphError(
                f"a graph was captured with {before.item()} as an argument, which is {number.item()} now: {what}"
            )
