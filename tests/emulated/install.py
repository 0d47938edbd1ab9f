"""Install the emulated card in this process's torch, and remove it."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch.utils import _device

from emulated import factories, pinned, triton_launch
from emulated.clocks import HOST
from emulated.faults import mend
from emulated.guard import set_guard
from emulated.memory import Card, plug
from emulated.torch_cuda import functions

_MISSING = object()
_lock = threading.Lock()
_undo: list[Callable[[], None]] = []


def install(memory: int = 256 << 20, processors: int = 132, capability: tuple[int, int] = (9, 0)) -> None:
    """Make torch find one emulated CUDA device; does nothing if it is installed already.

    Triton's kernels run in its interpreter, for which they must be defined: install the card before they are imported.

    Parameters
    ----------
    memory
        Bytes of the card's memory that this process can use.
    processors
        Number of streaming multiprocessors.
    capability
        Its compute capability.
    """
    with _lock:
        if _undo:
            return
        _device._device_constructors()  # remembers functions of torch that are replaced below
        set_guard(True)
        _undo.append(lambda: set_guard(False))
        card = Card(memory, processors, capability)
        plug(card)
        _undo.append(lambda: plug(None))
        library = torch.library.Library("aten", "IMPL", "CUDA")
        factories.register(library)
        _undo.append(library._destroy)
        for name, function in functions(card).items():
            _replace(torch.cuda, name, function)
        for name, function in factories.pinning().items():
            _replace(torch, name, function)
        _replace(torch.Tensor, "pin_memory", pinned.pin_memory)
        _replace(torch.Tensor, "is_pinned", pinned.is_pinned)
        swap = torch.__future__.get_swap_module_params_on_conversion()  # otherwise modules write to parameters' data
        torch.__future__.set_swap_module_params_on_conversion(True)
        _undo.append(lambda: torch.__future__.set_swap_module_params_on_conversion(swap))
        _environment("TRITON_INTERPRET", "1")
        for owner, name, function in triton_launch.replacements():
            _replace(owner, name, function)


def uninstall() -> None:
    """Restore torch as it was. Remaining tensors of the device can no longer be used."""
    with _lock:
        while _undo:
            _undo.pop()()
        mend()
        HOST.effects.clear()


def installed() -> bool:
    """Whether the card is installed."""
    return bool(_undo)


def _replace(owner: Any, name: str, value: Any) -> None:
    before = vars(owner).get(name, _MISSING)
    setattr(owner, name, value)
    _undo.append(lambda: delattr(owner, name) if before is _MISSING else setattr(owner, name, before))


def _environment(name: str, value: str) -> None:
    before = os.environ.get(name)
    os.environ[name] = value
    _undo.append(lambda: os.environ.pop(name, None) if before is None else os.environ.update({name: before}))
