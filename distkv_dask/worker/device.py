"""What a worker computes on: the host, or the card that it was given. No other module of the engine names CUDA.

A card is ``cuda:0`` of its process: dask-cuda gives each worker its own by ``CUDA_VISIBLE_DEVICES``. ROCm's torch
answers to the same names. Work on a card is queued, on one stream for each of a worker's lanes; what a lane has told
others is complete, because it waits for its stream first (:meth:`Device.finish`).
"""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distkv_dask.errors import DeviceError, in_words

BOUNCE_BYTES = 16 << 20
"""Pinned memory through which blocks go to and from a card, a piece at a time."""

_INSTALL = "install distkv-dask[gpu] and a torch that was built for it (https://pytorch.org/get-started/locally)"


class Use(Enum):
    """What a stream is for."""

    HOME = "home"
    HOLDER = "holder"
    """Goes first where the card has to choose: others wait for it."""
    COPIES = "copies"


class Device:
    """The host: memory is shared by all, nothing is queued, and buffers of both sides are the same.

    Attributes
    ----------
    torch
        The device as torch names it.
    name
        What it is called in ``engine.status()`` and in the names of kept timings.
    note
        What the user should know about the choice; empty if nothing.
    """

    def __init__(self, note: str = "") -> None:
        self.torch = torch.device("cpu")
        self.name = "cpu"
        self.note = note

    @property
    def is_host(self) -> bool:
        """Whether host code reads its memory directly."""
        return self.torch.type == "cpu"

    def stream(self, use: Use) -> AbstractContextManager[Any]:
        """Queue what the calling thread does inside a ``with`` statement on the stream of a use."""
        return nullcontext()

    def finish(self) -> None:
        """Wait until all that the calling thread has queued on its stream is done."""

    def mark(self) -> Mark:
        """A mark behind all that the calling thread has queued so far."""
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
        """A tensor on the device, of the host or of the device; do not write to it afterwards. Copies are queued."""
        return values

    def read(self, source: Tensor) -> np.ndarray[Any, Any]:
        """Bytes uint8 [n, size] of a tensor like that on the device: its memory itself where the host can read it."""
        return source.numpy()

    def write(self, target: Tensor, data: np.ndarray[Any, Any]) -> None:
        """Copy bytes uint8 [n] into a tensor like that on the device; they are there when this returns."""
        target.numpy()[:] = data

    def memory(self) -> tuple[int, int]:
        """Bytes of its memory that this process can still have, and of all of it; on the host both are 0: unlimited."""
        return 0, 0

    @contextmanager
    def peak(self) -> Iterator[Peak]:
        """Find what the calling thread allocates inside a ``with`` statement."""
        yield Peak()


class Peak:
    """Bytes of a device's memory that something took at most; 0 on the host, where nobody counts."""

    def __init__(self) -> None:
        self.bytes = 0


class Mark:
    """A point in a stream."""

    def wait(self) -> None:
        """Wait, on the host, until what was queued before the mark is done."""


class Pair:
    """A buffer in host memory and one on the device; on the host they are the same tensor.

    What is copied is read or written in the calling thread's stream order: wait before the host looks, or writes anew.
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


class Card(Device):
    """A GPU: ``cuda:0`` of this process. Use :func:`choose_device`, which makes one for all engines of a process."""

    def __init__(self) -> None:
        super().__init__()
        self.torch = torch.device("cuda", 0)
        self.name = torch.cuda.get_device_name(self.torch)
        self._streams = {use: torch.cuda.Stream(self.torch, priority=-(use is Use.HOLDER)) for use in Use}
        self._bounce = self.host_buffer((BOUNCE_BYTES,), torch.uint8)
        self._copying = threading.Lock()

    def stream(self, use: Use) -> AbstractContextManager[Any]:
        """Queue what the calling thread does inside a ``with`` statement on the stream of a use."""
        return torch.cuda.stream(self._streams[use])

    def finish(self) -> None:
        """Wait until all that the calling thread has queued on its stream is done."""
        torch.cuda.current_stream(self.torch).synchronize()

    def mark(self) -> Mark:
        """A mark behind all that the calling thread has queued so far."""
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
        """Bytes of its memory that this process can still have (with what torch keeps for it), and of all of it."""
        free, total = torch.cuda.mem_get_info(self.torch)
        with suppress(RuntimeError):  # another allocator than torch's, such as RMM's, does not say
            free += torch.cuda.memory_reserved(self.torch) - torch.cuda.memory_allocated(self.torch)
        return free, total

    @contextmanager
    def peak(self) -> Iterator[Peak]:
        """Find what the calling thread allocates inside a ``with`` statement."""
        found, (free, _) = Peak(), torch.cuda.mem_get_info(self.torch)
        before = None
        with suppress(RuntimeError):  # another allocator than torch's does not say: what it has taken by then counts
            torch.cuda.reset_peak_memory_stats(self.torch)
            before = torch.cuda.memory_allocated(self.torch)
        yield found
        self.finish()
        if before is None:
            found.bytes = max(0, free - torch.cuda.mem_get_info(self.torch)[0])
        else:
            found.bytes = torch.cuda.max_memory_allocated(self.torch) - before


class _CardMark(Mark):
    """An event on the calling thread's stream."""

    def __init__(self) -> None:
        self._event = torch.cuda.Event()
        self._event.record()

    def wait(self) -> None:
        """Wait, on the host, until what was queued before the mark is done."""
        self._event.synchronize()


HOST = Device()
"""The host, where nothing else is to be said."""


def choose_device(setting: str) -> Device:
    """The device that this process computes on.

    Parameters
    ----------
    setting
        ``distkv.device``: ``"cpu"``, ``"cuda"``, or ``"auto"``: the card that the process sees, if torch can use it.

    Raises
    ------
    DeviceError
        The setting is ``"cuda"``, and torch cannot use a card here.
    """
    if setting == "cpu":
        return HOST
    try:
        if torch.cuda.is_available():
            return _card()
        reason = _not_found()
    except Exception as error:  # a driver that is too old, a card that is broken or taken: each says so in its own way
        reason = f"torch {torch.__version__} cannot use the card: {in_words(error)}"
    if setting == "cuda":
        raise DeviceError(f"distkv.device is cuda, but {reason}")
    return Device(note=f"computes on the CPU: {reason}") if _sees_a_card() else HOST


@cache
def _card() -> Card:
    return Card()


def _not_found() -> str:
    """Why torch finds no card in this process, and what to do."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if _hides_all(visible):
        return f"CUDA_VISIBLE_DEVICES={visible!r} hides every card from this worker: give it one"
    if torch.version.cuda is None and getattr(torch.version, "hip", None) is None:
        return f"torch {torch.__version__} is built without CUDA: {_INSTALL}"
    seen = "" if visible is None else f" (CUDA_VISIBLE_DEVICES={visible!r})"
    return (
        f"torch {torch.__version__} finds no card{seen}: look with nvidia-smi whether the driver works and fits CUDA "
        f"{torch.version.cuda}"
    )


def _sees_a_card() -> bool:
    """Whether the machine has a card that this worker was not kept from."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return not _hides_all(visible)
    return any(Path(one).exists() for one in ("/dev/nvidia0", "/dev/kfd")) or shutil.which("nvidia-smi") is not None


def _hides_all(visible: str | None) -> bool:
    """Whether a value of CUDA_VISIBLE_DEVICES leaves a process no card."""
    return visible is not None and visible.strip() in ("", "-1")
