"""How operations on device tensors run: checked, counted, queued, and executed on the CPU tensors behind them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from emulated.counts import note
from emulated.pinned import pin
from emulated.rules import INDEXING, Signature, aten, regions, signature, stops
from emulated.tensor import CudaTensor
from emulated.transfers import to_device, to_host
from emulated.work import Kernel, perform, stop, tensors


def dispatch(func: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an operation that has at least one tensor on the device."""
    if func in _SPECIAL:
        return _SPECIAL[func](*args, **kwargs)
    known = signature(func)
    if known.composed:
        return func.decompose(*args, **kwargs)
    given = [*tensors(args), *tensors(list(kwargs.values()))]
    _same_device(func, args, kwargs)
    if stops(func, args):
        stop(known.name)
    held_args, held_kwargs = _held(args), _held(kwargs)
    if "device" in kwargs:
        held_kwargs["device"] = "cpu"
    if _is_host(kwargs):
        result = func(*held_args, **held_kwargs)
        return pin(result) if kwargs.get("pin_memory") else result
    if not known.launches:
        with torch.inference_mode(False):
            result = func(*held_args, **held_kwargs)
        return _wrapped(result, given, known.is_view)
    kernel = Kernel(
        known.name, lambda: func(*held_args, **held_kwargs), [x.bytes for x in given if isinstance(x, CudaTensor)],
        list(tensors(_written(known, held_args, held_kwargs))), lambda: regions(func, held_args),
    )  # fmt: skip
    kernel.numbers = [one for one in given if not isinstance(one, CudaTensor)]
    return _wrapped(perform(kernel), given, False)


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


def _wrapped(result: Any, given: list[Tensor], is_view: bool) -> Any:
    """Results as device tensors: a changed argument is returned; a view is an inference tensor if its base is."""
    plain = is_view and torch.is_inference_mode_enabled() and not given[0].is_inference()
    with torch.inference_mode(torch.is_inference_mode_enabled() and not plain):
        return _device_tensors(result, given)


def _device_tensors(result: Any, given: list[Tensor]) -> Any:
    if isinstance(result, Tensor):
        for one in given:
            if isinstance(one, CudaTensor) and one.bytes is result:
                if one.shape != result.shape or one.stride() != result.stride():
                    raise NotImplementedError("the emulated device cannot change the shape of a tensor in place")
                return one
        return CudaTensor(result)
    if isinstance(result, list | tuple):
        return type(result)(_device_tensors(one, given) for one in result)
    return result


def _is_host(kwargs: dict[str, Any]) -> bool:
    device = kwargs.get("device")
    return device is not None and torch.device(device).type == "cpu"


def _same_device(func: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse host tensors, except for scalars, and for indices, which are copied."""
    if func in INDEXING and isinstance(args[0], CudaTensor):
        for index in args[1]:
            if index is not None and not isinstance(index, CudaTensor):
                note("h2d", f"indices of {func}", index.nbytes)
                stop(f"indices of {func}")
        rest: Any = args[2:]
    else:
        rest = args
    known = signature(func)
    used = [*tensors(rest), *tensors(list(kwargs.values()))]
    foreign = [one for one in used if not isinstance(one, CudaTensor) and one.dim()]
    foreign += [one for one in tensors(_written(known, args, kwargs)) if not isinstance(one, CudaTensor)]
    if foreign:
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! "
            f"({func}: {[tuple(one.shape) for one in foreign]} on the host)"
        )


def copy(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    if isinstance(target, CudaTensor) and isinstance(source, CudaTensor):
        held, other = target.bytes, source.bytes
        perform(Kernel("copy_", lambda: held.copy_(other), [held, other], [held]))
    elif isinstance(target, CudaTensor):
        to_device(target.bytes, source, non_blocking)
    else:
        assert isinstance(source, CudaTensor)
        to_host(target, source.bytes, non_blocking)
    return target


def _to_copy(
    source: CudaTensor, *, dtype: torch.dtype | None = None, layout: Any = None, device: torch.device | None = None,
    pin_memory: bool | None = None, non_blocking: bool = False, memory_format: torch.memory_format | None = None,
) -> Tensor:  # fmt: skip
    form, held = memory_format or torch.preserve_format, source.bytes
    if device is None or torch.device(device).type == "cuda":
        copying = Kernel("_to_copy", lambda: aten._to_copy.default(held, dtype=dtype, memory_format=form), [held])
        return CudaTensor(perform(copying))
    target = torch.empty_like(held, dtype=dtype, memory_format=form)
    if non_blocking or pin_memory:
        pin(target)  # as torch does it
    to_host(target, held, non_blocking)
    return target


def _scalar(source: CudaTensor) -> Any:
    note("d2h", "item", source.bytes.nbytes)
    stop("item")
    return source.bytes.item()


def _histc(source: CudaTensor, bins: int = 100, min: float = 0, max: float = 0) -> Tensor:
    """CUDA also counts integers, and does not synchronize if the range is given."""
    if min == max:
        stop("histc")
    held = source.bytes
    kernel = Kernel("histc", lambda: torch.histc(held.double(), bins, min, max).to(held.dtype), [held])
    return CudaTensor(perform(kernel))


def _softmax(source: CudaTensor, dim: int, half_to_float: bool) -> Tensor:
    """CUDA can read half precision and write single precision in one kernel, which the CPU cannot."""
    held, dtype = source.bytes, torch.float32 if half_to_float else None
    return CudaTensor(perform(Kernel("_softmax", lambda: torch.softmax(held, dim, dtype=dtype), [held])))


_SPECIAL: dict[Any, Callable[..., Any]] = {
    aten.copy_.default: copy,
    aten._to_copy.default: _to_copy,
    aten._local_scalar_dense.default: _scalar,
    aten.histc.default: _histc,
    aten._softmax.default: _softmax,
}
