"""A card: memory, streams and pinned buffers of a worker's GPU.

It is ``cuda:0`` of its process: dask-cuda gives each worker its own by ``CUDA_VISIBLE_DEVICES``. ROCm's torch uses the
same names.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distkv_dask.errors import DeviceError, DeviceLostError, DeviceMemoryError, in_words
from distkv_dask.worker.device import Device, Graph, Mark, Peak, Use

BOUNCE_BYTES = 16 << 20
"""Pinned memory through which blocks go to and from a card, a piece at a time."""


_capturing = threading.RLock()
"""Held while a stream of the process is captured: during that time no thread may wait for the whole card."""

_NO_MEMORY = "out of memory", "ALLOC_FAILED"
"""Texts of out-of-memory errors of classes other than torch's: pinned memory, Triton's, cuBLAS's."""


class Card(Device):
    """A GPU: ``cuda:0`` of this process. Each engine of a worker has its own streams and graphs."""

    def __init__(self) -> None:
        super().__init__()
        self.torch = torch.device("cuda", 0)
        self.name = torch.cuda.get_device_name(self.torch)
        self._streams = {use: torch.cuda.Stream(self.torch, priority=-(use is Use.HOLDER)) for use in Use}
        self._bounce = self.host_buffer((BOUNCE_BYTES,), torch.uint8)
        self._copying = threading.Lock()
        self._graph_memory = torch.cuda.MemPool()
        """Memory pool of all graphs: a lane runs them one after the other, so they can share it."""

    def stream(self, use: Use) -> AbstractContextManager[Any]:
        """Queue what the calling thread does inside a ``with`` statement on the stream of a use.

        Raises
        ------
        DeviceMemoryError, DeviceLostError
            For an error of torch that says that the card is out of memory or has failed.
        """
        return _Queueing(self, self._streams[use])

    def finish(self) -> None:
        """Wait until everything that the calling thread has queued on its stream is done."""
        torch.cuda.current_stream(self.torch).synchronize()

    def mark(self) -> Mark:
        """A mark after everything that the calling thread has queued so far."""
        return _CardMark()

    def host_buffer(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """An uninitialised pinned tensor."""
        return torch.empty(tuple(shape), dtype=dtype, pin_memory=True)

    def put(self, values: Tensor) -> Tensor:
        """A tensor of the host on the card; do not write to it afterwards. The copy is queued."""
        if values.device == self.torch:
            return values
        return values.pin_memory().to(self.torch, non_blocking=True)

    def read(self, source: Tensor) -> np.ndarray[Any, Any]:
        """Bytes uint8 [n, size] of a tensor like that on the card, copied piece by piece through pinned memory."""
        data = np.empty(tuple(source.shape), np.uint8)
        flat, whole = source.reshape(-1), data.reshape(-1)
        with self._copying, self.stream(Use.COPIES):
            for at in range(0, flat.numel(), BOUNCE_BYTES):
                piece = flat[at : at + BOUNCE_BYTES]
                into = self._bounce[: piece.numel()]
                into.copy_(piece, non_blocking=True)
                self.finish()
                whole[at : at + BOUNCE_BYTES] = into.numpy()
        return data

    def write(self, target: Tensor, data: np.ndarray[Any, Any]) -> None:
        """Copy bytes uint8 [n] into a tensor like that on the card, piece by piece through pinned memory."""
        with self._copying, self.stream(Use.COPIES):
            for at in range(0, len(data), BOUNCE_BYTES):
                piece = data[at : at + BOUNCE_BYTES]
                through = self._bounce[: len(piece)]
                through.numpy()[:] = piece
                target[at : at + BOUNCE_BYTES].copy_(through, non_blocking=True)
                self.finish()

    def memory(self) -> tuple[int, int]:
        """Bytes that this process can still allocate (torch's cached memory included), and total bytes."""
        free, total = torch.cuda.mem_get_info(self.torch)
        with suppress(RuntimeError):  # allocators other than torch's, such as RMM's, do not report this
            free += torch.cuda.memory_reserved(self.torch) - torch.cuda.memory_allocated(self.torch)
        return free, total

    def graph(self) -> Graph:
        """A new graph, which records what a thread queues; its intermediate results are in memory shared by graphs."""
        return _CardGraph(self._graph_memory)

    def explain(self, error: RuntimeError) -> DeviceError | None:
        """The card's failure behind an error of torch or a library that uses it; None if there is none."""
        if not self._answers():
            self.lost = f"{self.name} failed: {in_words(error)}"
            return DeviceLostError(f"{self.lost}. The worker's process ends; look for the card's Xid in dmesg")
        if not isinstance(error, torch.OutOfMemoryError) and not any(words in str(error) for words in _NO_MEMORY):
            return None
        with suppress(RuntimeError):  # fragmented memory may suffice once it is returned
            torch.cuda.empty_cache()
        free, total = self.memory()
        return DeviceMemoryError(
            f"{self.name} ran out of memory in a step, with {free} of {total} bytes free now: lower kv_memory "
            f"(distkv.kv-memory) or distkv.prefill.chunk-tokens, or stop what else uses the card. {in_words(error)}"
        )

    def _answers(self) -> bool:
        """Whether the card can still be used: after a permanent error, every later call fails."""
        try:
            with _capturing:
                torch.cuda.synchronize(self.torch)
        except RuntimeError:
            return False
        return True

    @contextmanager
    def peak(self) -> Iterator[Peak]:
        """Measure the peak memory of the calling thread inside a ``with`` statement."""
        found, (free, _) = Peak(), torch.cuda.mem_get_info(self.torch)
        before = None
        with suppress(RuntimeError):  # allocators other than torch's do not report the peak: the final use counts
            torch.cuda.reset_peak_memory_stats(self.torch)
            before = torch.cuda.memory_allocated(self.torch)
        yield found
        self.finish()
        if before is None:
            found.bytes = max(0, free - torch.cuda.mem_get_info(self.torch)[0])
        else:
            found.bytes = torch.cuda.max_memory_allocated(self.torch) - before


class _Queueing(AbstractContextManager[None]):
    """Work on one stream; translates torch's errors."""

    def __init__(self, card: Card, stream: torch.cuda.Stream) -> None:
        self._card = card
        self._context = torch.cuda.stream(stream)

    def __enter__(self) -> None:
        self._context.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._context.__exit__(kind, error, trace)
        if isinstance(error, RuntimeError) and (explained := self._card.explain(error)) is not None:
            raise explained from error


class _CardGraph(Graph):
    """A CUDA graph."""

    def __init__(self, memory: torch.cuda.MemPool) -> None:
        self._memory = memory
        self._graph = torch.cuda.CUDAGraph()

    def begin_capture(self) -> None:
        """Record what the calling thread queues; other threads may use their streams as usual."""
        _capturing.acquire()
        gc.disable()  # freeing an older graph during a recording would invalidate it
        memory: Any = self._memory.id  # a tuple, as documented, unlike torch's types
        try:
            self._graph.capture_begin(pool=memory, capture_error_mode="thread_local")
        except RuntimeError:
            self._ended()
            raise

    def end_capture(self) -> None:
        """End the recording."""
        try:
            self._graph.capture_end()
        finally:
            self._ended()

    def _ended(self) -> None:
        gc.enable()
        _capturing.release()

    def replay(self) -> None:
        """Queue what was recorded."""
        self._graph.replay()


class _CardMark(Mark):
    """An event on the calling thread's stream."""

    def __init__(self) -> None:
        self._event = torch.cuda.Event()
        self._event.record()

    def wait(self) -> None:
        """Wait, on the host, until what was queued before the mark is done."""
        self._event.synchronize()
