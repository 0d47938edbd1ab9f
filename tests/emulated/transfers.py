"""Copies between host and device, as torch does them: what waits, what the host sees, and when."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from emulated.counts import note
from emulated.errors import RaceError
from emulated.pinned import PinnedMemory, pinned_memory
from emulated.shadow import Region
from emulated.streams import HOST, LOCK, Effect, Stream, current_stream
from emulated.tensor import CudaTensor
from emulated.work import launch, stop

_POISON = 0xA5
_POISON_FLOAT = 0xFF
"""NaN in all floating-point types."""


@dataclass
class Arrival(Effect):
    """A copy to pinned memory, which holds a pattern of no meaning until the host has waited for it."""

    target: Tensor
    memory: PinnedMemory
    sent: Tensor

    def happen(self) -> None:
        """The host sees what was copied."""
        with torch.inference_mode():
            self.target.copy_(self.sent)


@dataclass
class Departure(Effect):
    """A copy from pinned memory, which must not change before the host has waited for it."""

    source: Tensor
    memory: PinnedMemory
    sent: Tensor
    what: str

    def happen(self) -> None:
        """The source is the host's again: whether it has changed too early is seen now."""
        self.compare(self.source)

    def compare(self, source: Tensor) -> None:
        """Fail if the source, as the card would see it, is not what was sent."""
        if not torch.equal(_octets(source), _octets(self.sent)):
            raise RaceError(
                f"the host has changed pinned memory before the copy from it was done ({self.what}): wait for an event "
                "behind the copy, or write to another buffer"
            )


def to_device(target: CudaTensor, source: Tensor, non_blocking: bool) -> None:
    """Copy a host tensor to a device tensor of its shape, or of one to which it expands.

    From pinned memory the copy is queued. From other memory the driver takes the bytes at once. A blocking copy waits
    for the stream in both cases.
    """
    if source.dtype != target.dtype or not source.is_contiguous():
        source = source.to(target.dtype).contiguous()  # a temporary in ordinary memory, as torch makes it
    if not target.bytes.is_contiguous() or source.shape != target.shape:
        launch("copy_ of what has arrived", [], [target])
    stream, memory = current_stream(), pinned_memory(source)
    note("h2d", "pageable" if memory is None else "pinned", source.nbytes)
    tick = stream.begin("a copy to the device")
    target.memory.use(Region.of(target.bytes), True, stream, tick)
    sent = source if memory is None else _depart(source, memory, stream, tick)
    target.bytes.copy_(sent)
    if not non_blocking:
        stop("copy to the device")


def to_host(target: Tensor, source: CudaTensor, non_blocking: bool) -> None:
    """Copy a device tensor to a host tensor of its shape, or of one to which it expands.

    Into pinned memory the copy is queued, and the host sees it once it has waited. A blocking copy waits for the
    stream, and so does one into other memory, or into a layout that needs a temporary there.
    """
    sent = source.bytes
    if source.dtype != target.dtype or not sent.is_contiguous() or sent.shape != target.shape:
        launch("copy_ before it leaves", [source], [])
        sent = sent.to(target.dtype).expand(target.shape)
    stream, memory = current_stream(), pinned_memory(target) if target.is_contiguous() else None
    note("d2h", "pageable" if memory is None else "pinned", target.nbytes)
    tick = stream.begin("a copy to the host")
    source.memory.use(Region.of(source.bytes), False, stream, tick)
    if memory is None:
        stop("copy to the host")
        target.copy_(sent)
        return
    _arrive(target, memory, sent, tick)
    if not non_blocking:
        stop("copy to the host")


def _depart(source: Tensor, memory: PinnedMemory, stream: Stream, tick: int) -> Tensor:
    """Queue a copy from pinned memory; what it copies."""
    with LOCK:
        memory.use(_region(memory, source), False, stream, tick)
        sent = _as_queued(source, memory)
        what = stream.what(tick)
        HOST.effects.append(Departure(stream.number, tick, source.detach(), memory, sent, what))
    return sent


def _arrive(target: Tensor, memory: PinnedMemory, sent: Tensor, tick: int) -> None:
    """Queue a copy to pinned memory."""
    stream = current_stream()
    with LOCK, torch.inference_mode():
        memory.use(_region(memory, target), True, stream, tick)
        for effect in [one for one in HOST.effects if isinstance(one, Departure) and one.memory is memory]:
            effect.compare(_as_queued(effect.source, memory))  # from now on it is the card that changes it
            HOST.effects.remove(effect)
        _octets(target).fill_(_POISON_FLOAT if target.is_floating_point() else _POISON)
        HOST.effects.append(Arrival(stream.number, tick, target, memory, sent.clone()))


def _as_queued(source: Tensor, memory: PinnedMemory) -> Tensor:
    """What pinned memory holds for the card, for which what is queued has arrived there."""
    arrivals = [one for one in HOST.effects if isinstance(one, Arrival) and one.memory is memory]
    before = [one.target.clone() for one in arrivals]
    for one in arrivals:
        one.happen()
    seen = source.clone()
    with torch.inference_mode():
        for one, poison in reversed(list(zip(arrivals, before, strict=True))):
            one.target.copy_(poison)
    return seen


def _region(memory: PinnedMemory, tensor: Tensor) -> Region:
    """Where a contiguous host tensor lies in pinned memory."""
    return Region(tensor.data_ptr() - memory.address, (tensor.nbytes,), (1,), 1)


def _octets(tensor: Tensor) -> Tensor:
    """The bytes of a contiguous tensor."""
    return tensor.detach().reshape(-1).view(torch.uint8)
