"""The interface of a worker's device: memory, streams, buffers and marks.

The host is one device, on which waiting and copying do nothing; :mod:`distkv_dask.worker.card` is the other. Work on a
card is queued on one stream for each of a worker's lanes. What a lane reports is complete, because it waits for its
stream first (:meth:`Device.finish`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from enum import Enum
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor


class Use(Enum):
    """What a stream is for."""

    HOME = "home"
    HOLDER = "holder"
    """The stream with priority: other workers wait for its results."""
    COPIES = "copies"


class Device:
    """The host: memory is shared, nothing is queued, and buffers of both sides are the same.

    Attributes
    ----------
    torch
        The device as torch names it.
    name
        Its name in ``engine.status()`` and of kept timings.
    note
        A note on the choice for the user, or empty.
    lost
        Why this process can no longer use the device; empty while it can.
    """

    def __init__(self, note: str = "") -> None:
        self.torch = torch.device("cpu")
        self.name = "cpu"
        self.note = note
        self.lost = ""

    @property
    def is_host(self) -> bool:
        """Whether host code reads its memory directly."""
        return self.torch.type == "cpu"

    def stream(self, use: Use) -> AbstractContextManager[Any]:
        """Queue what the calling thread does inside a ``with`` statement on the stream of a use.

        Raises
        ------
        DeviceMemoryError, DeviceLostError
            For an error of torch that says that a card is out of memory or has failed.
        """
        return nullcontext()

    def finish(self) -> None:
        """Wait until all that the calling thread has queued on its stream is done."""

    def mark(self) -> Mark:
        """A mark after everything that the calling thread has queued so far."""
        return Mark()

    def host_buffer(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor in host memory from which the device copies at full speed."""
        return torch.empty(tuple(shape), dtype=dtype)

    def pair(self, shape: Sequence[int], dtype: torch.dtype) -> Pair:
        """A new buffer on both sides."""
        return self.mirror(torch.empty(tuple(shape), dtype=dtype, device=self.torch))

    def mirror(self, there: Tensor) -> Pair:
        """A tensor of the device, and a buffer like it in host memory."""
        return Pair(there if self.is_host else self.host_buffer(there.shape, there.dtype), there)

    def put(self, values: Tensor) -> Tensor:
        """A tensor of the host or the device, on the device; do not write to it afterwards. Copies are queued."""
        return values

    def read(self, source: Tensor) -> np.ndarray[Any, Any]:
        """Bytes uint8 [n, size] of such a tensor on the device: its own memory if the host can read it."""
        return source.numpy()

    def write(self, target: Tensor, data: np.ndarray[Any, Any]) -> None:
        """Copy bytes uint8 [n] into such a tensor on the device; returns when they are copied."""
        target.numpy()[:] = data

    def memory(self) -> tuple[int, int]:
        """Bytes that this process can still allocate, and total bytes; on the host both are 0: unlimited."""
        return 0, 0

    def graph(self) -> Graph | None:
        """A new graph, which records what a thread queues; None on the host, where nothing is queued."""
        return None

    @contextmanager
    def peak(self) -> Iterator[Peak]:
        """Measure the peak memory of the calling thread inside a ``with`` statement."""
        yield Peak()


class Peak:
    """Peak bytes of a device's memory; 0 on the host, where they are not counted."""

    def __init__(self) -> None:
        self.bytes = 0


class Graph(Protocol):
    """Work of one thread, recorded once and repeated in the same memory; launching it costs the host one call."""

    def begin_capture(self) -> None:
        """Record, and do not run, what the calling thread queues until :meth:`end_capture`.

        Raises
        ------
        RuntimeError
            Queued operations may raise it, too, if one of them has to wait for the card.
        """

    def end_capture(self) -> None:
        """End the recording.

        Raises
        ------
        RuntimeError
            The recording is invalid.
        """

    def replay(self) -> None:
        """Queue the recorded work; it reads the current contents of its memory."""


class Mark:
    """A point in a stream."""

    def wait(self) -> None:
        """Wait, on the host, until what was queued before the mark is done."""


class Pair:
    """A buffer in host memory and one on the device; on the host they are the same tensor.

    Copies run in the calling thread's stream order: wait before the host reads or writes the buffer.
    """

    def __init__(self, host: Tensor, there: Tensor) -> None:
        self.host = host
        self.there = there
        self._apart = there is not host

    def up(self) -> None:
        """Queue the copy from the host to the device."""
        if self._apart:
            self.there.copy_(self.host, non_blocking=True)

    def down(self) -> None:
        """Queue the copy from the device to the host."""
        if self._apart:
            self.host.copy_(self.there, non_blocking=True)


HOST = Device()
"""The host, without a note."""
