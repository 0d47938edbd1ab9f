"""Tensors made on the device, and pinned ones on the host."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from emulated.dispatch import copy
from emulated.memory import card
from emulated.pinned import pin
from emulated.streams import current_stream
from emulated.tensor import CudaTensor
from emulated.work import Kernel, perform

_FILLED = (
    "arange", "eye", "linspace", "logspace", "randperm", "scalar_tensor", "tril_indices", "triu_indices",
)  # fmt: skip
_PINNED = (
    "arange", "empty", "empty_like", "empty_strided", "full", "full_like", "ones", "ones_like", "rand", "randn",
    "tensor", "zeros", "zeros_like",
)  # fmt: skip


def register(library: torch.library.Library) -> None:
    """Register the device's kernels of factory functions; functions that take a device tensor need none."""
    library.impl("empty.memory_format", _empty)
    library.impl("empty_strided", _empty_strided)
    library.impl("copy_", copy)  # torch.tensor() copies without the tensors' own dispatch
    for name in _FILLED:
        packet = getattr(torch.ops.aten, name)
        for overload in packet.overloads():
            func = getattr(packet, overload)
            if not overload.endswith("out") and any(one.name == "device" for one in func._schema.arguments):
                library.impl(func.name().removeprefix("aten::"), _filled(func))


def pinning() -> dict[str, Callable[..., Tensor]]:
    """Factory functions of ``torch``, by name, that support pinned memory."""
    return {name: _pinning(getattr(torch, name)) for name in _PINNED}


def _pinning(real: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def made(*args: Any, **kwargs: Any) -> Tensor:
        if not kwargs.get("pin_memory"):
            return real(*args, **kwargs)
        result = real(*args, **{**kwargs, "pin_memory": False})
        if isinstance(result, CudaTensor):
            raise RuntimeError("Only dense CPU tensors can be pinned")
        return pin(result)

    return made


def _room(numel: int, dtype: torch.dtype | None) -> torch.dtype:
    """The dtype; raises before the host allocates memory that the card does not have."""
    dtype = dtype or torch.get_default_dtype()
    card().find_room(numel * dtype.itemsize, current_stream())
    return dtype


def _empty(
    size: list[int], dtype: Any = None, layout: Any = None, device: Any = None, pin_memory: Any = None,
    memory_format: Any = None,
) -> Tensor:  # fmt: skip
    dtype = _room(torch.Size(size).numel(), dtype)
    with torch.inference_mode(False):
        held = torch.ops.aten.empty.memory_format(size, dtype=dtype, device="cpu", memory_format=memory_format)
    return CudaTensor(held)


def _empty_strided(
    size: list[int], stride: list[int], dtype: Any = None, layout: Any = None, device: Any = None,
    pin_memory: Any = None,
) -> Tensor:  # fmt: skip
    dtype = _room(torch.Size(size).numel(), dtype)
    with torch.inference_mode(False):
        held = torch.ops.aten.empty_strided.default(size, stride, dtype=dtype, device="cpu")
    return CudaTensor(held)


def _filled(func: torch._ops.OpOverload) -> Callable[..., Tensor]:
    def made(*args: Any, **kwargs: Any) -> Tensor:
        kwargs.pop("layout", None)
        name = func._schema.name.removeprefix("aten::")
        kernel = Kernel(name, lambda: func(*args, **{**kwargs, "device": "cpu"}), [])
        return CudaTensor(perform(kernel))

    return made
