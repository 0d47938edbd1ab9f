"""The card: its properties, and its memory, which tensors allocate and free."""

from __future__ import annotations

import types
import weakref
from typing import Any

import torch
from torch import Tensor

from emulated.clocks import HOST, LOCK, Clock, Queue, advance
from emulated.counts import note
from emulated.errors import RaceError
from emulated.faults import FAULTS
from emulated.shadow import Memory
from emulated.streams import current_stream

_ROUND = 512
"""Allocations are multiples of this many bytes."""
_SEGMENT = 2 << 20
"""Memory is reserved from the card in multiples of this many bytes."""
_OTHERS = 5 << 28
"""Bytes that other processes use: transformers assumes that every card has more than 1.2 GiB."""


class Card:
    """Properties of the card, and bytes of its memory in use."""

    def __init__(self, memory: int, processors: int, capability: tuple[int, int]) -> None:
        self.total = memory + _OTHERS
        self.ours = memory
        """Bytes that this process can use."""
        major, minor = capability
        self.properties = types.SimpleNamespace(
            name="Emulated GPU", total_memory=self.total, multi_processor_count=processors, major=major, minor=minor,
            warp_size=32, max_threads_per_multi_processor=2048, shared_memory_per_block_optin=232448,
            L2_cache_size=50 << 20, is_integrated=False, is_multi_gpu_board=False, gcnArchName="",
        )  # fmt: skip
        self.allocated = self.peak = self.reserved = self.peak_reserved = 0
        self.freed: list[tuple[int, int, Clock]] = []
        """Memory that was freed while other streams might use it: bytes, the stream that may reuse it, and its uses."""

    def find_room(self, nbytes: int, stream: Queue) -> None:
        """Check that there is memory for a stream.

        Raises
        ------
        torch.OutOfMemoryError
            The card has not enough free memory.
        RaceError
            Memory that the stream's allocator may reuse is still used by another stream.
        """
        with LOCK:
            if stream.capture is None:
                self._reuse(nbytes, stream)
            free = self.ours - self.allocated
            if FAULTS.allocation() or nbytes > free:
                raise torch.OutOfMemoryError(
                    f"CUDA out of memory. Tried to allocate {nbytes / 2**20:.2f} MiB. GPU 0 has a total capacity of "
                    f"{self.total / 2**20:.2f} MiB of which {free / 2**20:.2f} MiB is free."
                )

    def take(self, nbytes: int, stream: Queue) -> None:
        """Allocate memory for a stream; raises as :meth:`find_room` does."""
        with LOCK:
            self.find_room(nbytes, stream)
            self.allocated += nbytes
            self.peak = max(self.peak, self.allocated)
            self.reserved = max(self.reserved, -(-self.allocated // _SEGMENT) * _SEGMENT)
            self.peak_reserved = max(self.peak_reserved, self.reserved)

    def give_back(self, nbytes: int) -> None:
        """Free memory."""
        with LOCK:
            self.allocated -= nbytes

    def empty_cache(self) -> None:
        """Return unused memory to the card."""
        with LOCK:
            self.reserved = -(-self.allocated // _SEGMENT) * _SEGMENT
            self.freed.clear()

    def _reuse(self, nbytes: int, stream: Queue) -> None:
        """Check that memory which the allocator may give to the stream is no longer used by others."""
        clock = dict(stream.clock)
        advance(clock, HOST.clock)
        self.freed = [one for one in self.freed if one[1] != stream.number or _after(one[2], clock)]
        for size, home, uses in self.freed:
            if home == stream.number and size >= nbytes:
                other, tick = next((by, at) for by, at in uses.items() if at > clock.get(by, 0))
                self.freed.clear()
                raise RaceError(
                    f"memory that is allocated on {stream} was freed while stream {other} might still use it "
                    f"({Queue.numbered(other).what(tick)}): record_stream() there, or wait before it is freed"
                )


def _after(uses: Clock, clock: Clock) -> bool:
    return any(tick > clock.get(stream, 0) for stream, tick in uses.items())


class DeviceMemory(Memory):
    """A storage's memory on the card."""

    def __init__(self, card: Card, nbytes: int) -> None:
        size = -(-nbytes // _ROUND) * _ROUND
        self._stream = current_stream()
        card.take(size, self._stream)
        super().__init__(nbytes)
        self._size, self._card = size, card
        self.graph: Any = self._stream.capture
        """The capture in which it was allocated, if any: it then belongs to a graph."""
        self.recorded: set[int] = set()
        """Streams that were recorded: the memory is reused only after their work."""
        note("alloc", "memory", size)

    def __del__(self) -> None:
        if not hasattr(self, "recorded"):
            return  # the allocation failed
        self._card.give_back(self._size)
        uses = {by: at for by, at in self.last.items() if by != self._stream.number and by not in self.recorded}
        if uses and self.graph is None:
            self._card.freed.append((self._size, self._stream.number, uses))


_slot: list[Card] = []


def card() -> Card:
    """The installed card."""
    return _slot[0]


def plug(new: Card | None) -> None:
    """Install a card, or remove it."""
    _slot[:] = [] if new is None else [new]


def memory_of(held: Tensor) -> DeviceMemory:
    """The card's memory for a CPU tensor's storage, which is allocated if there is none."""
    memory = known_memory(held)
    if memory is None:
        storage = held.untyped_storage()
        memory = DeviceMemory(card(), storage.nbytes())
        storage.emulated = weakref.ref(memory)
        if memory.graph is not None:
            memory.graph.storages.append(storage)
    return memory


def known_memory(held: Tensor) -> DeviceMemory | None:
    """The card's memory for a CPU tensor's storage; None if there is none, or it was freed."""
    known = getattr(held.untyped_storage(), "emulated", None)
    return None if known is None else known()
