"""Vectors of 16 floats for numba: a type, and the few operations that attention needs, as LLVM instructions.

Numba vectorises plain loops, but neither keeps a tile of accumulators in registers nor knows bfloat16. LLVM splits a
vector of 16 into whatever the processor has, so the same code serves AVX-512, AVX2 and Arm. Memory is given by address
and index, as the pools' dtypes have no numba type.

Numba's disk cache checks only the file of a compiled function: touch numba_jit.py and numba_plan.py after a change
here.
"""

# numba has no types of its own: a decorated function is untyped for the checker.
# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call,misc"

from __future__ import annotations

import math

from llvmlite import ir
from numba.core import types
from numba.core.datamodel import PrimitiveModel, register_default
from numba.extending import intrinsic

_I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_FLOAT, _HALF = ir.FloatType(), ir.HalfType()
_V16 = ir.VectorType(_FLOAT, 16)
# A pool's dtype travels as the type of an argument, because numba knows neither bfloat16 nor float16 on CPUs.
BF16, FP16, FP32, INT8 = types.uint16, types.int16, types.float32, types.int8
_ELEMENT = {BF16: _I16, FP16: _HALF, FP32: _FLOAT, INT8: _I8}
# 2 ** r for r in [-0.5, 0.5], highest power first; relative error below fp32 rounding (Cephes exp2f).
_EXP2 = (1.535336188e-4, 1.339887440e-3, 9.618437358e-3, 5.550332471e-2, 2.402264791e-1, 6.931472029e-1, 1.0)

# tanh(r) / r - 1 over r ** 2, in powers of r ** 2, for r up to 0.625 (Cephes tanhf).
_TANH = (-5.70498872745e-3, 2.06390887954e-2, -5.37397155531e-2, 1.33314422036e-1, -3.33332819422e-1)


class Vector(types.Type):
    """Numba's type of 16 float32 in a register."""

    def __init__(self) -> None:
        super().__init__(name="Float32x16")


vector = Vector()


@register_default(Vector)
class _VectorModel(PrimitiveModel):
    def __init__(self, dmm, fe_type) -> None:
        super().__init__(dmm, fe_type, _V16)


def _pointer(builder, address, index, element):
    return builder.gep(builder.inttoptr(address, element.as_pointer()), [index])


def _splat(builder, value, count=16):
    one = builder.insert_element(ir.Constant(ir.VectorType(value.type, count), ir.Undefined), value, _I32(0))
    return builder.shuffle_vector(one, one, ir.Constant(ir.VectorType(_I32, count), [0] * count))


def _constant(value, count=16):
    return ir.Constant(ir.VectorType(_FLOAT, count), [value] * count)


def _shuffle(builder, a, b, lanes):
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(_I32, len(lanes)), lanes))


def _call(builder, name, *values):
    """Call an LLVM intrinsic over vectors."""
    kind = values[0].type
    function_type = ir.FunctionType(kind, [value.type for value in values])
    suffix = f"v{kind.count}f32"
    return builder.call(builder.module.declare_intrinsic(f"{name}.{suffix}", (), function_type), values)


def _widen(builder, kind, raw, count):
    """Elements of a pool as float32."""
    floats = ir.VectorType(_FLOAT, count)
    if kind == BF16:
        wide = builder.zext(raw, ir.VectorType(_I32, count))
        return builder.bitcast(builder.shl(wide, ir.Constant(wide.type, [16] * count)), floats)
    if kind == FP16:
        return builder.fpext(raw, floats)
    return builder.sitofp(raw, floats) if kind == INT8 else raw


def _load(builder, kind, address, index, count):
    element = _ELEMENT[kind]
    at = _pointer(builder, address, index, element)
    pointer = builder.bitcast(at, ir.VectorType(element, count).as_pointer())
    return _widen(builder, kind, builder.load(pointer, align=kind.bitwidth // 8), count)


@intrinsic
def load(typingctx, like, address, index):
    """16 elements of a pool from ``index`` on, as floats; the type of ``like`` determines their dtype."""

    def generate(context, builder, signature, arguments):
        return _load(builder, like, arguments[1], arguments[2], 16)

    return vector(like, types.int64, types.int64), generate


@intrinsic
def load_half(typingctx, like, address, index):
    """Eight elements of a pool and eight zeros."""

    def generate(context, builder, signature, arguments):
        half = _load(builder, like, arguments[1], arguments[2], 8)
        return _shuffle(builder, half, _constant(0.0, 8), list(range(16)))

    return vector(like, types.int64, types.int64), generate


@intrinsic
def store(typingctx, address, index, value):
    """Write 16 floats."""

    def generate(context, builder, signature, arguments):
        at = _pointer(builder, arguments[0], arguments[1], _FLOAT)
        builder.store(arguments[2], builder.bitcast(at, _V16.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, vector), generate


@intrinsic
def store_sums(typingctx, address, index, a, b, c, d):
    """Write the sums of four vectors: four floats."""

    def generate(context, builder, signature, arguments):
        def fold(x, y, low, high):
            return builder.fadd(_shuffle(builder, x, y, low), _shuffle(builder, x, y, high))

        low = [lane + of for i in range(4) for lane in (4 * i, 4 * i + 1) for of in (0, 16)]
        ab, cd = (fold(x, y, low, [lane + 2 for lane in low]) for x, y in (arguments[2:4], arguments[4:6]))
        pairs = [lane for i in range(4) for lane in (4 * i, 4 * i + 1, 16 + 4 * i, 17 + 4 * i)]
        quads = fold(ab, cd, pairs, [lane + 2 for lane in pairs])
        eight = fold(quads, quads, list(range(8)), list(range(8, 16)))
        four = fold(eight, eight, [0, 1, 2, 3], [4, 5, 6, 7])
        at = _pointer(builder, arguments[0], arguments[1], _FLOAT)
        builder.store(four, builder.bitcast(at, four.type.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, *[vector] * 4), generate


@intrinsic
def splat(typingctx, value):
    """The same float in all 16 lanes."""

    def generate(context, builder, signature, arguments):
        return _splat(builder, arguments[0])

    return vector(types.float32), generate


@intrinsic
def fma(typingctx, a, b, c):
    """``a * b + c``."""

    def generate(context, builder, signature, arguments):
        return _call(builder, "llvm.fmuladd", *arguments)

    return vector(vector, vector, vector), generate


@intrinsic
def maximum(typingctx, a, b):
    """The maximum of each lane."""

    def generate(context, builder, signature, arguments):
        a, b = arguments
        return builder.select(builder.fcmp_ordered(">", a, b), a, b)

    return vector(vector, vector), generate


@intrinsic
def turn(typingctx, a):
    """Lanes rotated by four: with scores stored as [token][4 rows], those of the next token."""

    def generate(context, builder, signature, arguments):
        return _shuffle(builder, arguments[0], arguments[0], [(lane + 4) % 16 for lane in range(16)])

    return vector(vector), generate


def _polynomial(builder, x, factors):
    """Evaluate a polynomial, whose factors are given from the highest power down."""
    y = _constant(factors[0])
    for factor in factors[1:]:
        y = _call(builder, "llvm.fmuladd", y, x, _constant(factor))
    return y


def _exp2(builder, x):
    lowest = _constant(-126.0)
    tiny = builder.fcmp_unordered("<", x, lowest)
    x = builder.select(tiny, lowest, x)
    whole = _call(builder, "llvm.floor", builder.fadd(x, _constant(0.5)))
    power = _polynomial(builder, builder.fsub(x, whole), _EXP2)
    integers = ir.VectorType(_I32, 16)
    biased = builder.add(builder.fptosi(whole, integers), ir.Constant(integers, [127] * 16))
    exponent = builder.bitcast(builder.shl(biased, ir.Constant(integers, [23] * 16)), _V16)
    return builder.select(tiny, _constant(0.0), builder.fmul(power, exponent))


@intrinsic
def exp2(typingctx, x):
    """``2 ** x`` for x up to 127; exactly 0 below -126 and for -inf."""

    def generate(context, builder, signature, arguments):
        return _exp2(builder, arguments[0])

    return vector(vector), generate


@intrinsic
def tanh(typingctx, x):
    """Within two roundings, for tiny arguments too: a polynomial, and from 0.625 on an exponential."""

    def generate(context, builder, signature, arguments):
        size, one = _call(builder, "llvm.fabs", arguments[0]), _constant(1.0)
        square = builder.fmul(size, size)
        inner = builder.fmul(_polynomial(builder, square, _TANH), square)
        near = _call(builder, "llvm.fmuladd", inner, size, size)
        fall = _exp2(builder, builder.fmul(size, _constant(-2 * math.log2(math.e))))
        far = builder.fdiv(builder.fsub(one, fall), builder.fadd(one, fall))
        value = builder.select(builder.fcmp_ordered("<", size, _constant(0.625)), near, far)
        return _call(builder, "llvm.copysign", value, arguments[0])

    return vector(vector), generate


@intrinsic
def number(typingctx, address, index):
    """The float32 at an index."""

    def generate(context, builder, signature, arguments):
        return builder.load(_pointer(builder, arguments[0], arguments[1], _FLOAT))

    return types.float32(types.int64, types.int64), generate


@intrinsic
def put(typingctx, address, index, value):
    """Write one float32."""

    def generate(context, builder, signature, arguments):
        builder.store(arguments[2], _pointer(builder, arguments[0], arguments[1], _FLOAT))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.float32), generate


@intrinsic
def integer(typingctx, address, index):
    """The int32 at an index."""

    def generate(context, builder, signature, arguments):
        return builder.sext(builder.load(_pointer(builder, arguments[0], arguments[1], _I32)), _I64)

    return types.int64(types.int64, types.int64), generate


@intrinsic
def fetch_and_increment(typingctx, address):
    """Add one to an int64 that other threads increment too; returns the value before."""

    def generate(context, builder, signature, arguments):
        pointer = builder.inttoptr(arguments[0], _I64.as_pointer())
        return builder.atomic_rmw("add", pointer, _I64(1), "monotonic")

    return types.int64(types.int64), generate


@intrinsic
def prefetch(typingctx, address):
    """Prefetch a line of memory into the second-level cache."""

    def generate(context, builder, signature, arguments):
        pointer = builder.inttoptr(arguments[0], _I8.as_pointer())
        kinds = [pointer.type, _I32, _I32, _I32]
        function = builder.module.declare_intrinsic(
            "llvm.prefetch", (pointer.type,), ir.FunctionType(ir.VoidType(), kinds)
        )
        builder.call(function, [pointer, _I32(0), _I32(2), _I32(1)])
        return context.get_dummy_value()

    return types.void(types.int64), generate
