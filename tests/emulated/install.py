"""Putting the emulated card into this process's torch, and taking it out again."""

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
    """Have torch find one CUDA device that does not exist; nothing if it is there already.

    Triton's kernels run in its interpreter, in which they have to have been defined: install before they are imported.

    Parameters
    ----------
    memory
        Bytes that this process can have of the card's memory.
    processors
        How many streaming multiprocessors it has.
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
        swap = torch.__future__.get_swap_module_params_on_conversion()  # else modules write to parameters' data
        torch.__future__.set_swap_module_params_on_conversion(True)
        _undo.append(lambda: torch.__future__.set_swap_module_params_on_conversion(swap))
        _environment("TRITON_INTERPRET", "1")
        for owner, name, function in triton_launch.replacements():
            _replace(owner, name, function)


def uninstall() -> None:
    """Restore torch as it was. Tensors of the device that are left are of no use any more."""
    with _lock:
        while _undo:
            _undo.pop()()
        mend()
        HOST.effects.clear()


def installed() -> bool:
    """Whether the card is there."""
    return bool(_undo)


def _replace(owner: Any, name: str, value: Any) -> None:
    before = vars(owner).get(name, _MISSING)
    setattr(owner, name, value)
    _undo.append(lambda: delattr(owner, name) if before is _MISSING else setattr(owner, name, before))


def _environment(name: str, value: str) -> None:
    before = os.environ.get(name)
    os.environ[name] = value
    _undo.append(lambda: os.environ.pop(name, None) if before is None else os.environ.update({name: before}))
