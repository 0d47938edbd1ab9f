"""MicroAttention and merge in the C++ core (kernels/native), loaded through ctypes: the fast path on CPU.

ctypes releases the interpreter lock during a call, and the core may be called from several threads at once. The core
checks the values of index tensors itself, so that Python only checks shapes in a decode step.
"""

from __future__ import annotations

import ctypes
import hashlib
import struct
from collections.abc import Sequence
from functools import lru_cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch

from .contract import Call, lengths_message, offsets_message, slots_message, tables_message
from .native_layout import disagreement, layout_of
from .native_structures import PackedDecoderLayer, PackedLayers, PackedLinear

_DTYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2, torch.int8: 3}
_ARGS = struct.Struct("<28q2d")  # distkv::Args in native/core.h
_POINTERS = struct.Struct("<3q")  # its first fields: q, k, v
_SCALE = struct.Struct("<d")  # its last field
_SCALE_AT = _ARGS.size - _SCALE.size
_NAMES = ("amx_bf16", "avx512_bf16", "avx512", "avx2", "neon_bf16", "neon", "portable")
_MODELS = ("amx_model_avx512", "amx_model")
_TILES_OF_BF16 = ("amx_bf16",)
Packed = ctypes.Array[ctypes.c_char]
"""Arguments as the core reads them; writable."""
PackedMerge = tuple[int | None, ...]


def path() -> Path | None:
    """The file of the core, if it was built."""
    files = (Path(__file__).with_name(f"_core{suffix}") for suffix in EXTENSION_SUFFIXES)
    return next((file for file in files if file.exists()), None)


@lru_cache(maxsize=1)
def _load() -> ctypes.CDLL | str:
    """The core, or the reason why there is none."""
    file = path()
    if file is None:
        return "the C++ core was not built (no compiler at install time); reinstall with one: pip install -e ."
    try:
        core = ctypes.CDLL(str(file))
    except OSError as error:
        return f"{file.name} does not load: {error}"
    layouts = {
        "args": [_ARGS.size, *range(0, _ARGS.size, 8)],
        "layers": layout_of(PackedLayers),
        "linear": layout_of(PackedLinear),
        "decoder_layer": layout_of(PackedDecoderLayer),
    }
    if (reason := disagreement(core, layouts)) is not None:
        return f"{file.name} was built from another version, {reason}; rebuild it: pip install -e ."
    core.distkv_isa.restype = ctypes.c_char_p
    core.distkv_isa.argtypes = [ctypes.c_int64, ctypes.c_int]
    core.distkv_choose_isa.argtypes = [ctypes.c_int64, ctypes.c_int, ctypes.c_char_p]
    core.distkv_has_isa.argtypes = [ctypes.c_char_p]
    core.distkv_attend.argtypes = [ctypes.c_char_p, ctypes.c_char_p]
    core.distkv_read.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64]
    core.distkv_layer.argtypes = [ctypes.c_void_p] * 4 + [ctypes.c_int64, ctypes.c_double]
    core.distkv_linear_kernels.restype = ctypes.c_void_p
    core.distkv_linear_kernels.argtypes = [ctypes.c_char_p]
    core.distkv_linear.argtypes = [*[ctypes.c_void_p] * 3, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p]
    core.distkv_merge.argtypes = [ctypes.c_void_p] * 5 + [ctypes.c_int64] * 4
    return core


def missing() -> str | None:
    """Why the core cannot serve, or None if it can."""
    core = _load()
    return core if isinstance(core, str) else None


def fingerprint() -> str:
    """A value that differs between builds of the core."""
    file = path()
    return "" if file is None else hashlib.sha256(file.read_bytes()).hexdigest()


def _core() -> ctypes.CDLL:
    core = _load()
    if isinstance(core, str):
        raise ValueError(f"implementation: 'native' is not available: {core}")
    return core


def instruction_sets(dtype: torch.dtype | None = None, *, many: bool = True) -> list[str]:
    """Instruction sets that the core has and this processor supports; the first is used unless one was chosen.

    With a ``dtype`` of KV, sets that pass such KV, or rows of few queries, to another set are left out.
    """
    core = _core()
    left = () if dtype is None or (many and dtype == torch.bfloat16) else _TILES_OF_BF16
    return [name for name in _NAMES if name not in left and core.distkv_has_isa(name.encode())]


def software_models() -> list[str]:
    """Instruction sets in software, for tests on any processor of what other sets compute; slow, and never chosen."""
    core = _core()
    return [name for name in _MODELS if core.distkv_has_isa(name.encode())]


def serve_with(dtype: torch.dtype, *, few: str, many: str) -> None:
    """Choose the instruction sets for all later calls of this process that do not name one.

    Parameters
    ----------
    dtype
        Of the KV.
    few, many
        One of :func:`instruction_sets` for rows of few queries (decode) and of many (prefill, shared prefixes).

    Raises
    ------
    ValueError
        The processor or the core has no such instruction set.
    """
    for is_many, name in enumerate((few, many)):
        if _core().distkv_choose_isa(_DTYPES[dtype], is_many, name.encode()):
            raise ValueError(f"instruction set: expected one of {instruction_sets()}, got {name!r}")


def serving(dtype: torch.dtype) -> tuple[str, str]:
    """Default instruction sets for KV of a dtype: for few queries, and for many."""
    few, many = (_core().distkv_isa(_DTYPES[dtype], is_many).decode() for is_many in range(2))
    return few, many


def run(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend with the default instruction sets; see :func:`distkv_dask.kernels.micro_attention` for the contract."""
    return run_isa(call, b"")


def run_isa(call: Call, isa: bytes) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend with one of :func:`instruction_sets` (empty: the default ones)."""
    if not call.q.is_contiguous():
        call = call._replace(q=call.q.contiguous())
    out, lse = call.empty_result()
    status = _core().distkv_attend(pack(call, out, lse), isa)
    if status:
        raise _error(status, call)
    return out, lse


def run_packed(
    packed: Packed, call: Call, q: torch.Tensor, k_pool: torch.Tensor, v_pool: torch.Tensor, scale: float
) -> None:
    """Attend with the packed arguments of ``call``, but other tensors of the same shapes, strides and dtypes."""
    _POINTERS.pack_into(packed, 0, q.data_ptr(), k_pool.data_ptr(), v_pool.data_ptr())
    _SCALE.pack_into(packed, _SCALE_AT, scale)
    status = _core().distkv_attend(packed, b"")
    if status:
        raise _error(status, call)


def pack_layers(
    packed: Sequence[Packed], k_layers: Sequence[torch.Tensor], v_layers: Sequence[torch.Tensor], *slots: torch.Tensor
) -> PackedLayers:
    """Arguments of :func:`run_layer`: each layer's call and pools, and int64 [n] block ids and offsets."""
    addresses = (
        [ctypes.addressof(each) for each in packed],
        *([view.data_ptr() for view in layers] for layers in (k_layers, v_layers)),
    )
    pointers = [(ctypes.c_void_p * len(packed))(*each) for each in addresses]
    blocks, offsets = slots
    made = PackedLayers(
        *(ctypes.addressof(each) for each in pointers),
        len(packed),
        blocks.data_ptr(),
        offsets.data_ptr(),
        blocks.numel(),
    )
    made.kept = packed, pointers, slots
    return made


def run_layer(
    packed: PackedLayers, call: Call, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor | None, scale: float
) -> None:
    """Append contiguous k, v to a layer and attend with q, for a batch packed from ``call``."""
    values = 0 if v is None else v.data_ptr()
    status = _core().distkv_layer(ctypes.addressof(packed), q.data_ptr(), k.data_ptr(), values, layer, scale)
    if status:
        raise _error(status, call)


def address(name: str) -> int:
    """Address of a function of the core, for native callers."""
    return ctypes.cast(getattr(_core(), name), ctypes.c_void_p).value or 0


def pack(call: Call, out: torch.Tensor, lse: torch.Tensor) -> Packed:
    """Arguments of the core for a checked call with contiguous queries, whose tensors must outlive them."""
    q, k, v, tables, lengths, scale, offsets, _, starts, k_scales, v_scales, threads, first_keys, soft_cap = call[:14]
    tokens, heads, d = q.shape
    blocks, kv_heads, block_tokens, _ = k.shape
    rows, max_blocks = tables.shape
    arguments = _ARGS.pack(
        q.data_ptr(),
        k.data_ptr(),
        v.data_ptr(),
        tables.data_ptr(),
        lengths.data_ptr(),
        0 if offsets is None else offsets.data_ptr(),
        0 if starts is None else starts.data_ptr(),
        0 if first_keys is None else first_keys.data_ptr(),
        0 if k_scales is None else k_scales.data_ptr(),
        0 if v_scales is None else v_scales.data_ptr(),
        out.data_ptr(),
        lse.data_ptr(),
        rows,
        tokens,
        heads,
        kv_heads,
        d,
        block_tokens,
        blocks,
        max_blocks,
        tables.stride(0),
        k.stride(0),
        v.stride(0),
        v.shape[3],
        v.stride(2),
        _DTYPES[q.dtype],
        _DTYPES[k.dtype],
        threads,
        soft_cap or 0.0,
        scale,
    )
    return ctypes.create_string_buffer(arguments, len(arguments))


def _error(status: int, call: Call) -> Exception:
    if status == 1:
        return ValueError(lengths_message(call.block_tables.shape[1], call.k_pool.shape[2]))
    if status == 2:
        return ValueError(offsets_message(call.q.shape[0]))
    if status == 3:
        return ValueError(tables_message(call.k_pool.shape[0]))
    if status == 5:
        return ValueError(slots_message())
    return MemoryError("the attention kernel could not allocate its scratch memory")


def merge_into(
    out: torch.Tensor, lse: torch.Tensor, part_out: torch.Tensor, part_lse: torch.Tensor, index: torch.Tensor | None
) -> bool:
    """Merge contiguous float32 CPU tensors whose shapes were checked; False if an index is out of range or twice."""
    return merge_packed(pack_merge(out, lse, part_out, part_lse, index))


def merge_packed(packed: PackedMerge) -> bool:
    """Merge what :func:`pack_merge` packed; False if an index is out of range or twice."""
    return not _core().distkv_merge(*packed)


def pack_merge(
    out: torch.Tensor, lse: torch.Tensor, part_out: torch.Tensor, part_lse: torch.Tensor, index: torch.Tensor | None
) -> PackedMerge:
    """Arguments of the core for tensors that :func:`merge_into` takes and that must outlive them."""
    tokens, heads, d = out.shape
    return (
        out.data_ptr(),
        lse.data_ptr(),
        part_out.data_ptr(),
        part_lse.data_ptr(),
        None if index is None else index.data_ptr(),
        tokens if index is None else index.shape[0],
        tokens,
        heads,
        d,
    )


def read_memory(tensor: torch.Tensor, threads: int) -> None:
    """Read a contiguous CPU tensor once and discard it: measures the read bandwidth of this machine."""
    _core().distkv_read(tensor.data_ptr(), tensor.numel() * tensor.element_size(), threads)


def linear_kernels(name: str) -> int | None:
    """Address of an instruction set's products of few rows; None if the core or the processor has none."""
    found: int | None = _core().distkv_linear_kernels(name.encode())
    return found


def linear(weights: int, kernels: int, rows: torch.Tensor, out: torch.Tensor) -> None:
    """Multiply rows [n, inputs] with packed weights (few_rows.py), into ``out``; MemoryError without room."""
    if _core().distkv_linear(weights, kernels, rows.data_ptr(), rows.shape[0], rows.stride(0), out.data_ptr()):
        raise MemoryError(f"no memory for a copy of {rows.shape[0]} rows")
