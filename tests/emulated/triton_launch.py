"""Triton's kernels on the emulated device: Triton's interpreter runs one at a time, and every address is checked."""

from __future__ import annotations

import inspect
import threading
from bisect import bisect_right
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from torch import Tensor

from emulated.clocks import Queue
from emulated.memory import known_memory
from emulated.shadow import GRANULE
from emulated.tensor import CudaTensor
from emulated.work import Work, perform

_ONE = threading.Lock()
"""The interpreter replaces functions of ``triton.language`` while a kernel runs."""
_running: list[Launch] = []
"""The running launch."""


class Launch(Work):
    """A kernel with its arguments: memory that it was given, and the parts that it uses."""

    def __init__(self, name: str, run: Callable[[], None], given: list[Tensor]) -> None:
        super().__init__(name)
        self._run, self._given = run, given
        storages = {one.untyped_storage().data_ptr(): one.untyped_storage() for one in given if one.nbytes}
        self._bases = sorted(storages)
        self._sizes = [storages[base].nbytes() for base in self._bases]
        self._used: dict[tuple[int, bool], np.ndarray] = {}

    def given(self) -> Iterable[Tensor]:
        return self._given

    def written(self) -> Iterable[Tensor]:
        """All arguments, because those that it changes are known only when it runs."""
        return self._given

    def do(self, stream: Queue, tick: int) -> None:
        """Run it, and check afterwards that it was allowed to use the memory that it has used."""
        self._used.clear()
        with _ONE:
            _running.append(self)
            try:
                self._run()
            finally:
                _running.pop()
        memories = {one.untyped_storage().data_ptr(): known_memory(one) for one in self._given}
        for (base, write), used in self._used.items():
            memory = memories[base]
            if memory is not None:
                memory.use(np.flatnonzero(used), write, stream, tick)

    def touch(self, pointers: Any, mask: Any, write: bool) -> None:
        """Record that elements are loaded or stored: all, or those where the mask is true."""
        data = pointers.data if mask is None else pointers.data[np.broadcast_to(mask.data, pointers.data.shape)]
        addresses = data.astype(np.int64).ravel()
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        while addresses.size:
            at = bisect_right(self._bases, int(addresses.min())) - 1
            base, room = self._bases[at], self._sizes[at]
            here = addresses < base + room
            if at < 0 or not here.any():
                raise IndexError(f"{self.name}: an illegal memory access: no argument's memory is there")
            used = self._used.setdefault((base, write), np.zeros(-(-room // GRANULE), bool))
            used[(addresses[here] - base) // GRANULE] = True
            used[(addresses[here] - base + size - 1) // GRANULE] = True
            addresses = addresses[~here]


def replacements() -> list[tuple[Any, str, Any]]:
    """Replacements in Triton (owner, name, value); none if Triton is not installed."""
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
        held_args, held_kwargs = [_held(one) for one in args], {key: _held(one) for key, one in kwargs.items()}
        launch = Launch(
            name,
            lambda: real(function, *held_args, grid=grid, warmup=False, **held_kwargs),
            [one.bytes for one in tensors],
        )
        launch.variant = _variant(function, args, kwargs)
        perform(launch)

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
    """Multiply bfloat16 in float32, because the interpreter multiplies its bits as integers."""
    from triton import language as tl

    def dot(builder: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        wide = [builder.cast_impl(one, tl.float32) if one.dtype.scalar == tl.bfloat16 else one for one in (a, b)]
        return real(builder, *wide, d, *rest)

    return dot


def _wide_cast(real: Callable[..., Any]) -> Callable[..., Any]:
    """Convert bfloat16 through float32, because the interpreter supports no other conversions."""
    from triton import language as tl

    def cast(builder: Any, source: Any, target: Any) -> Any:
        kinds = source.dtype.scalar, target.scalar
        if tl.bfloat16 in kinds and tl.float32 not in kinds and kinds[0] != kinds[1]:
            source = real(builder, source, tl.float32)
        return real(builder, source, target)

    return cast


def _variant(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """Properties for which the compiler makes separate variants: constants, types, values of 1, multiples of 16."""
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
