"""Triton's kernels on the emulated device: its interpreter runs them, one at a time, and every address is checked."""

from __future__ import annotations

import inspect
import threading
from bisect import bisect_right
from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor

from emulated.counts import note
from emulated.memory import DeviceMemory
from emulated.shadow import GRANULE
from emulated.streams import current_stream
from emulated.tensor import CudaTensor

_ONE = threading.Lock()
"""The interpreter replaces functions of ``triton.language`` while a kernel runs."""
_running: list[Launch] = []
"""The launch that runs."""


class Launch:
    """Memory that a kernel was given, and what it uses of that."""

    def __init__(self, kernel: str, tensors: list[CudaTensor]) -> None:
        self._kernel = kernel
        given = {one.untyped_storage().data_ptr(): one.memory for one in tensors if one.memory.nbytes}
        self._bases = sorted(given)
        self._memories = [given[base] for base in self._bases]
        self._used: dict[tuple[DeviceMemory, bool], np.ndarray] = {}

    def touch(self, pointers: Any, mask: Any, write: bool) -> None:
        """Elements are loaded or stored: all, or those where the mask is true."""
        data = pointers.data if mask is None else pointers.data[np.broadcast_to(mask.data, pointers.data.shape)]
        addresses = data.astype(np.int64).ravel()
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        while addresses.size:
            at = bisect_right(self._bases, int(addresses.min())) - 1
            memory, base = self._memories[at], self._bases[at]
            here = addresses < base + memory.nbytes
            if at < 0 or not here.any():
                raise IndexError(f"{self._kernel}: an illegal memory access: no argument's memory is there")
            used = self._used.setdefault((memory, write), np.zeros(-(-memory.nbytes // GRANULE), bool))
            used[(addresses[here] - base) // GRANULE] = True
            used[(addresses[here] - base + size - 1) // GRANULE] = True
            addresses = addresses[~here]

    def queue(self) -> None:
        """Queue the kernel, now that it is known what it uses."""
        stream = current_stream()
        tick = stream.begin(self._kernel)
        for (memory, write), used in self._used.items():
            memory.use(np.flatnonzero(used), write, stream, tick)


def replacements() -> list[tuple[Any, str, Any]]:
    """What to replace in Triton: owner, name, value. Nothing where there is no Triton."""
    try:
        from triton.runtime import interpreter
    except ImportError:
        return []
    builder = interpreter.InterpreterBuilder
    return [
        (interpreter.InterpretedFunction, "run", _launching(interpreter.InterpretedFunction.run)),
        (builder, "create_dot", _wide_dot(builder.create_dot)),
        (builder, "cast_impl", _wide_cast(builder.cast_impl)),
        (builder, "create_masked_load", _touching(builder.create_masked_load, lambda mask, *_: mask, False)),
        (builder, "create_masked_store", _touching(builder.create_masked_store, lambda _, mask, *__: mask, True)),
        (builder, "create_atomic_rmw", _atomic(builder.create_atomic_rmw)),
        (builder, "create_atomic_cas", _touching(builder.create_atomic_cas, lambda *_: None, True)),
    ]


def _launching(real: Callable[..., Any]) -> Callable[..., Any]:
    def run(function: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        given = [*args, *kwargs.values()]
        tensors = [one for one in given if isinstance(one, Tensor)]
        if warmup or not tensors:
            return real(function, *args, grid=grid, warmup=warmup, **kwargs)
        if any(not isinstance(one, CudaTensor) for one in tensors):
            raise ValueError("Pointer argument cannot be accessed from Triton (cpu tensor?)")
        name = function.__name__
        note("launch", name, variant=_variant(function, args, kwargs))
        launch = Launch(name, tensors)
        with _ONE:
            _running.append(launch)
            try:
                real(function, *map(_held, args), grid=grid, warmup=False, **{k: _held(v) for k, v in kwargs.items()})
            finally:
                _running.pop()
        launch.queue()

    return run


def _held(value: Any) -> Any:
    return value.bytes if isinstance(value, CudaTensor) else value


def _touching(real: Callable[..., Any], mask_of: Callable[..., Any], write: bool) -> Callable[..., Any]:
    def access(builder: Any, pointers: Any, *rest: Any) -> Any:
        if _running:
            _running[-1].touch(pointers, mask_of(*rest), write)
        return real(builder, pointers, *rest)

    return access


def _atomic(real: Callable[..., Any]) -> Callable[..., Any]:
    def access(builder: Any, operation: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        if _running:
            _running[-1].touch(pointers, mask, True)
        return real(builder, operation, pointers, value, mask, *rest)

    return access


def _wide_dot(real: Callable[..., Any]) -> Callable[..., Any]:
    """The interpreter multiplies the bits of bfloat16 as integers; here they are multiplied in float32."""
    from triton import language as tl

    def dot(builder: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        wide = [builder.cast_impl(one, tl.float32) if one.dtype.scalar == tl.bfloat16 else one for one in (a, b)]
        return real(builder, *wide, d, *rest)

    return dot


def _wide_cast(real: Callable[..., Any]) -> Callable[..., Any]:
    """The interpreter converts bfloat16 from and to float32 only; here others go through that."""
    from triton import language as tl

    def cast(builder: Any, source: Any, target: Any) -> Any:
        kinds = source.dtype.scalar, target.scalar
        if tl.bfloat16 in kinds and tl.float32 not in kinds and kinds[0] != kinds[1]:
            source = real(builder, source, tl.float32)
        return real(builder, source, target)

    return cast


def _variant(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """For what the compiler would make a variant of its own: constants, types, what is 1 or divisible by 16."""
    given = {**dict(zip(function.arg_names, args, strict=False)), **kwargs}
    plain = set(function.kwargs.get("do_not_specialize") or ())
    hints = inspect.get_annotations(function.fn)
    constant = {name for name in given if name not in function.arg_names or "constexpr" in str(hints.get(name))}
    return tuple((name, value if name in constant else _kind(value, name in plain)) for name, value in given.items())


def _kind(value: Any, plain: bool) -> Any:
    if isinstance(value, CudaTensor):
        return f"*{value.dtype}", (value.storage_offset() * value.element_size()) % 16 == 0
    if isinstance(value, int) and not isinstance(value, bool):
        wide = "i64" if not -(2**31) <= value < 2**31 else "i32"
        return wide if plain else 1 if value == 1 else (wide, value % 16 == 0)
    return value if value is None else type(value).__name__
