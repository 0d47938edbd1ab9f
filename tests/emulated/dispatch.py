"""How an operation on device tensors runs: it is checked, counted, queued, and done on the CPU tensors behind them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from emulated.counts import note
from emulated.pinned import pin
from emulated.rules import INDEXING, Signature, aten, regions, signature, stops
from emulated.tensor import CudaTensor
from emulated.transfers import to_device, to_host
from emulated.work import launch, stop


def dispatch(func: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an operation at least one of whose tensors is on the device."""
    if func in _SPECIAL:
        return _SPECIAL[func](*args, **kwargs)
    known = signature(func)
    if known.composed:
        return func.decompose(*args, **kwargs)
    tensors = list(_tensors(args)) + list(_tensors(kwargs.values()))
    args = _same_device(func, args, kwargs)
    on_host = _is_host(kwargs)
    if stops(func, args):
        stop(known.name)
    if known.launches:
        written = list(_tensors(_written(known, args, kwargs)))
        given = [one for one in tensors if isinstance(one, CudaTensor)]
        reads = [one for one in given if not any(one is other for other in written)]
        launch(known.name, reads, written, regions(func, args))
    with torch.inference_mode(False):
        result = func(*_held(args), **_held({**kwargs, "device": "cpu"} if "device" in kwargs else kwargs))
    if on_host:
        return pin(result) if kwargs.get("pin_memory") else result
    plain = known.is_view and torch.is_inference_mode_enabled() and not tensors[0].is_inference()
    with torch.inference_mode(torch.is_inference_mode_enabled() and not plain):
        return _wrapped(result, tensors)


def _tensors(values: Any) -> Iterator[Tensor]:
    """Tensors among arguments, and in lists among them."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _written(known: Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    if not known.written:
        return []
    named = {**dict(zip(known.names, args, strict=False)), **kwargs}
    return [named[name] for name in known.written if name in named]


def _held(value: Any) -> Any:
    """Arguments with the CPU tensors behind those of the device."""
    if isinstance(value, CudaTensor):
        return value.bytes
    if isinstance(value, list | tuple):
        return type(value)(map(_held, value)) if type(value) in (list, tuple) else value
    if isinstance(value, dict):
        return {name: _held(one) for name, one in value.items()}
    return value


def _wrapped(result: Any, given: list[Tensor]) -> Any:
    """Results as device tensors; what an operation has changed is the argument itself."""
    if isinstance(result, Tensor):
        for one in given:
            if isinstance(one, CudaTensor) and one.bytes is result:
                if one.shape != result.shape or one.stride() != result.stride():
                    raise NotImplementedError("the emulated device cannot change the shape of a tensor in place")
                return one
        return CudaTensor(result)
    if isinstance(result, list | tuple):
        return type(result)(_wrapped(one, given) for one in result)
    return result


def _is_host(kwargs: dict[str, Any]) -> bool:
    device = kwargs.get("device")
    return device is not None and torch.device(device).type == "cpu"


def _same_device(func: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """Refuse tensors of the host, but for single numbers and for indices, which are copied."""
    if func in INDEXING and isinstance(args[0], CudaTensor):
        for index in args[1]:
            if index is not None and not isinstance(index, CudaTensor):
                note("h2d", f"indices of {func}", index.nbytes)
                stop(f"indices of {func}")
        rest: Any = args[2:]
    else:
        rest = args
    known = signature(func)
    foreign = [one for one in _tensors((*rest, *kwargs.values())) if not isinstance(one, CudaTensor) and one.dim()]
    foreign += [one for one in _tensors(_written(known, args, kwargs)) if not isinstance(one, CudaTensor)]
    if foreign:
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! "
            f"({func}: {[tuple(one.shape) for one in foreign]} on the host)"
        )
    return args


def copy(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    if isinstance(target, CudaTensor) and isinstance(source, CudaTensor):
        launch("copy_", [source], [target])
        with torch.inference_mode(False):
            target.bytes.copy_(source.bytes)
    elif isinstance(target, CudaTensor):
        with torch.inference_mode(False):
            to_device(target, source, non_blocking)
    else:
        assert isinstance(source, CudaTensor)
        to_host(target, source, non_blocking)
    return target


def _to_copy(
    source: CudaTensor, *, dtype: torch.dtype | None = None, layout: Any = None, device: torch.device | None = None,
    pin_memory: bool | None = None, non_blocking: bool = False, memory_format: torch.memory_format | None = None,
) -> Tensor:  # fmt: skip
    form = memory_format or torch.preserve_format
    if device is None or torch.device(device).type == "cuda":
        launch("_to_copy", [source], [])
        with torch.inference_mode(False):
            held = aten._to_copy.default(source.bytes, dtype=dtype, memory_format=form)
        return CudaTensor(held)
    target = torch.empty_like(source.bytes, dtype=dtype, memory_format=form)
    if non_blocking or pin_memory:
        pin(target)  # as torch does it
    to_host(target, source, non_blocking)
    return target


def _scalar(source: CudaTensor) -> Any:
    note("d2h", "item", source.bytes.nbytes)
    stop("item")
    return source.bytes.item()


def _histc(source: CudaTensor, bins: int = 100, min: float = 0, max: float = 0) -> Tensor:
    """CUDA counts integers, too, and needs no look at them where it is told their range."""
    launch("histc", [source], [])
    if min == max:
        stop("histc")
    with torch.inference_mode(False):
        held = torch.histc(source.bytes.double(), bins, min, max).to(source.dtype)
    return CudaTensor(held)


_SPECIAL: dict[Any, Callable[..., Any]] = {
    aten.copy_.default: copy,
    aten._to_copy.default: _to_copy,
    aten._local_scalar_dense.default: _scalar,
    aten.histc.default: _histc,
}
