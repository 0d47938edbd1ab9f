"""Pinned host memory: the card copies from and to it while the host continues."""

from __future__ import annotations

import weakref
from bisect import bisect_right
from typing import Any

import torch
from torch import Tensor

from emulated.clocks import LOCK
from emulated.shadow import Memory


class PinnedMemory(Memory):
    """A piece of pinned memory."""

    def __init__(self, address: int, nbytes: int) -> None:
        super().__init__(nbytes)
        self.address = address


_pieces: list[PinnedMemory] = []
"""All pieces, by address."""


def pin(tensor: Tensor) -> Tensor:
    """Mark the memory of a host tensor as pinned for as long as it exists."""
    storage = tensor.untyped_storage()
    if storage.nbytes() and not is_pinned(tensor):
        piece = PinnedMemory(storage.data_ptr(), storage.nbytes())
        with LOCK:
            _pieces.insert(bisect_right(_pieces, piece.address, key=_address), piece)
        weakref.finalize(storage, _forget, piece).atexit = False
    return tensor


def pinned_memory(tensor: Tensor) -> PinnedMemory | None:
    """The pinned memory that contains a host tensor, including tensors made from NumPy views of it, or None."""
    address = tensor.data_ptr()
    with LOCK:
        at = bisect_right(_pieces, address, key=_address) - 1
        piece = _pieces[at] if at >= 0 else None
    return piece if piece is not None and address < piece.address + piece.nbytes else None


def is_pinned(tensor: Tensor, device: Any = None) -> bool:
    """Whether a tensor is in pinned memory."""
    return tensor.device.type == "cpu" and tensor.numel() > 0 and pinned_memory(tensor) is not None


def pin_memory(tensor: Tensor, device: Any = None) -> Tensor:
    """The tensor, or a copy of it in pinned memory."""
    if tensor.device.type != "cpu":
        raise RuntimeError(f"cannot pin 'torch.{tensor.device.type}' tensors: only dense CPU tensors can be pinned")
    return tensor if is_pinned(tensor) else pin(torch.clone(tensor, memory_format=torch.contiguous_format))


def _address(piece: PinnedMemory) -> int:
    return piece.address


def _forget(piece: PinnedMemory) -> None:
    with LOCK:
        _pieces.remove(piece)
