"""Copies between host and device as in torch: which of them wait, and when the host sees their results."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from emulated.clocks import HOST, LOCK, Effect, Queue
from emulated.errors import CaptureError, RaceError, StaleGraphError
from emulated.pinned import PinnedMemory, pinned_memory
from emulated.shadow import Region
from emulated.streams import current_stream
from emulated.work import Kernel, Work, perform, stop, use

_POISON = 0xA5
_POISON_FLOAT = 0xFF
"""Bytes that are NaN in all floating-point types."""


def to_device(target: Tensor, source: Tensor, non_blocking: bool) -> None:
    """Copy a host tensor to the bytes of a device tensor of its shape, or of one to which it expands.

    From pinned memory the copy is queued. From other memory the driver takes the bytes at once. A blocking copy waits
    for the stream in both cases.
    """
    if source.dtype != target.dtype or not source.is_contiguous():
        source = source.to(target.dtype).contiguous()  # a temporary in ordinary memory, as torch makes it
    perform(Upload(target, source))
    if not target.is_contiguous() or source.shape != target.shape:
        perform(Kernel("copy_ of what has arrived", lambda: None, [target], [target]))
    if not non_blocking:
        stop("copy to the device")


def to_host(target: Tensor, source: Tensor, non_blocking: bool) -> None:
    """Copy the bytes of a device tensor to a host tensor of its shape, or of one to which it expands.

    Into pinned memory the copy is queued, and the host sees it once it has waited. A blocking copy waits for the
    stream, and so does one into other memory, or into a layout that needs a temporary there.
    """
    first = None
    if source.dtype != target.dtype or not source.is_contiguous() or source.shape != target.shape:
        dtype, shape = target.dtype, target.shape
        first = Kernel("copy_ before it leaves", lambda: source.to(dtype).expand(shape).contiguous().clone(), [source])
        source = perform(first)
    pinned = target.is_contiguous() and pinned_memory(target) is not None
    perform(Download(source, target))
    if not pinned or not non_blocking:
        stop("copy to the host")
    if not pinned:
        target.copy_(source)


class _Borrowed:
    """A host tensor whose memory a graph uses, but does not keep alive."""

    def __init__(self, tensor: Tensor) -> None:
        self._storage = weakref.ref(tensor.untyped_storage())
        self._view = tensor.storage_offset(), tensor.size(), tensor.stride()
        self._dtype = tensor.dtype

    def get(self) -> Tensor:
        """The tensor."""
        storage = self._storage()
        if storage is None:
            raise StaleGraphError("a graph copies from or to pinned memory that was freed")
        with torch.inference_mode(False):
            return torch.empty(0, dtype=self._dtype).set_(storage, *self._view)


class Copy(Work):
    """A copy between host memory and the bytes of a device tensor."""

    def __init__(self, held: Tensor, host: Tensor) -> None:
        self._pinned = pinned_memory(host) is not None
        super().__init__("pinned" if self._pinned else "pageable")
        self._held, self._host = held, _Borrowed(host)
        self.nbytes = host.nbytes
        if current_stream().capture is not None and not self._pinned:
            raise CaptureError("a copy from or to pageable memory is not permitted when stream is capturing")

    def given(self) -> Iterable[Tensor]:
        return [self._held]


class Upload(Copy):
    """A copy to the device."""

    kind = "h2d"

    def written(self) -> Iterable[Tensor]:
        return [self._held]

    def do(self, stream: Queue, tick: int) -> None:
        source = self._host.get()
        use(self._held, True, stream, tick)
        memory = pinned_memory(source)
        with torch.inference_mode(False):
            if memory is not None and stream.capture is None:
                source = _depart(source, memory, stream, tick)
            self._held.copy_(source)


class Download(Copy):
    """A copy to the host; the caller fills memory that is not pinned."""

    kind = "d2h"

    def do(self, stream: Queue, tick: int) -> None:
        target = self._host.get()
        use(self._held, False, stream, tick)
        memory = pinned_memory(target)
        if memory is not None and stream.capture is None:
            _arrive(target, memory, self._held, stream, tick)


@dataclass
class _Arrival(Effect):
    """A copy to pinned memory, which holds a meaningless pattern until the host has waited for the copy."""

    target: Tensor
    memory: PinnedMemory
    sent: Tensor

    def happen(self) -> None:
        """Let the host see the copy."""
        with torch.inference_mode():
            self.target.copy_(self.sent)


@dataclass
class _Departure(Effect):
    """A copy from pinned memory, which must not change before the host has waited for the copy."""

    source: Tensor
    memory: PinnedMemory
    sent: Tensor
    what: str

    def happen(self) -> None:
        """Check that the source has not changed; the host may use it again."""
        self.compare(self.source)

    def compare(self, source: Tensor) -> None:
        """Raise if the source, as the card would see it, differs from what was sent."""
        if not torch.equal(_octets(source), _octets(self.sent)):
            raise RaceError(
                f"the host has changed pinned memory before the copy from it was done ({self.what}): wait for an event "
                "behind the copy, or write to another buffer"
            )


def _depart(source: Tensor, memory: PinnedMemory, stream: Queue, tick: int) -> Tensor:
    """Queue a copy from pinned memory; returns the copied values."""
    with LOCK:
        memory.use(_region(memory, source), False, stream, tick)
        sent = _as_queued(source, memory)
        HOST.effects.append(_Departure(stream.number, tick, source, memory, sent, stream.what(tick)))
    return sent


def _arrive(target: Tensor, memory: PinnedMemory, sent: Tensor, stream: Queue, tick: int) -> None:
    """Queue a copy to pinned memory."""
    with LOCK, torch.inference_mode():
        memory.use(_region(memory, target), True, stream, tick)
        for effect in [one for one in HOST.effects if isinstance(one, _Departure) and one.memory is memory]:
            effect.compare(_as_queued(effect.source, memory))  # from here on the card changes it
            HOST.effects.remove(effect)
        _octets(target).fill_(_POISON_FLOAT if target.is_floating_point() else _POISON)
        HOST.effects.append(_Arrival(stream.number, tick, target, memory, sent.clone()))


def _as_queued(source: Tensor, memory: PinnedMemory) -> Tensor:
    """Contents of pinned memory as the card sees it, after the queued copies to it."""
    arrivals = [one for one in HOST.effects if isinstance(one, _Arrival) and one.memory is memory]
    before = [one.target.clone() for one in arrivals]
    for one in arrivals:
        one.happen()
    seen = source.clone()
    with torch.inference_mode():
        for one, poison in reversed(list(zip(arrivals, before, strict=True))):
            one.target.copy_(poison)
    return seen


def _region(memory: PinnedMemory, tensor: Tensor) -> Region:
    """The region of a contiguous host tensor in pinned memory."""
    return Region(tensor.data_ptr() - memory.address, (tensor.nbytes,), (1,), 1)


def _octets(tensor: Tensor) -> Tensor:
    """The bytes of a contiguous tensor."""
    return tensor.detach().reshape(-1).view(torch.uint8)
