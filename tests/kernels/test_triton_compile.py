"""The Triton kernels compile for real GPUs: no spills, registers and shared memory that fit, overlapped 16-byte loads.

Compiling needs no GPU. On a real one, a spill would make a kernel slow, an oversized tile could not be launched, and
with one buffer, or narrow loads, memory would wait for arithmetic.
"""

from __future__ import annotations

import os
import re
import subprocess
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed: pip install distkv-dask[gpu]")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from distkv_dask.kernels import triton_batch, triton_jit, triton_merge  # noqa: E402
from distkv_dask.kernels.triton_tiles import Family, Tiles, padded, tiles_for  # noqa: E402

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1 replaces the compiler by the interpreter", allow_module_level=True)

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
FEW_REGISTERS = 168  # three blocks of four warps on a processor
ROCM_SPILLS = 8  # registers
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


class Processor(NamedTuple):
    """A compiler's target, its family, and bytes of shared memory that a program can use."""

    target: GPUTarget
    family: Family
    shared: int


PROCESSORS = {
    "sm_80": Processor(GPUTarget("cuda", 80, 32), "ampere", 163 << 10),
    "sm_90": Processor(GPUTarget("cuda", 90, 32), "hopper", 227 << 10),
    "sm_100": Processor(GPUTarget("cuda", 100, 32), "hopper", 227 << 10),
    "gfx942": Processor(GPUTarget("hip", "gfx942", 64), "rocm", 64 << 10),
}


class Kernel(NamedTuple):
    """An attention kernel: for rows of few queries or of many, head dim, dtype, pool, tokens of a block."""

    few: bool
    d: int
    dtype: str = "bf16"
    int8: bool = False
    block_tokens: int = 64
    windows: bool = False
    capped: bool = False

    def __str__(self) -> str:
        pool = "int8" if self.int8 else self.dtype
        more = "-windows" * self.windows + "-capped" * self.capped
        return f"{'few' if self.few else 'many'}-{self.d}-{pool}-blocks-of-{self.block_tokens}{more}"


USUAL = [Kernel(True, 128), Kernel(False, 128)]
OTHERS = [
    *(Kernel(few, d) for few in (True, False) for d in (64, 256)),
    *(Kernel(few, d, int8=True) for few in (True, False) for d in (128, 256)),
    *(Kernel(few, 128, block_tokens=16) for few in (True, False)),
    Kernel(True, 256, "fp32"),
]
WINDOWS = [
    Kernel(few, d, windows=True, capped=capped) for few in (True, False) for d in (128, 256) for capped in (False, True)
]
FORMS = [(128, "fp16"), (128, "bf16", False, 32), (80,), (64, "bf16", True)]
NIGHTLY = [*(Kernel(few, *form) for few in (True, False) for form in FORMS), Kernel(True, 128, "fp32")]
# All targets take two minutes without a cache of earlier compilations; sm_80 has the fewest registers to spare.
EVERYWHERE = [*USUAL, *OTHERS, *WINDOWS, *NIGHTLY] if "EXAMPLES" in os.environ else USUAL
PAIRS = [(processor, kernel) for processor in PROCESSORS for kernel in EVERYWHERE]
PAIRS += [("sm_80", kernel) for kernel in [*OTHERS, *WINDOWS[1:6:4]] if kernel not in EVERYWHERE]
everywhere = pytest.mark.parametrize(("processor", "kernel"), PAIRS, ids=str)


def compile_for(processor: str, function: Any, types: dict[str, str], constants: dict[str, Any], **options: Any) -> Any:
    target = PROCESSORS[processor].target
    try:
        triton.compiler.make_backend(target)
    except (RuntimeError, KeyError):
        pytest.skip(f"this triton does not compile for {processor}")
    names = function.arg_names
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    constexprs = {(names.index(name),): value for name, value in constants.items()}
    aligned = [name for name in names if signature[name].startswith("*") or name.endswith("block_stride")]
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(fn=function, signature=signature, constexprs=constexprs, attrs=attributes)
    return triton.compile(source, target=target, options=options)


def tiles_of(processor: str, kernel: Kernel) -> Tiles:
    family = PROCESSORS[processor].family
    tiles = tiles_for(family, kernel.d, kernel.block_tokens, DTYPES[kernel.dtype], kernel.int8, kernel.capped)
    return tiles[0 if kernel.few else 1]


def compile_attend(processor: str, kernel: Kernel, ones: tuple[str, ...] = ()) -> Any:
    kv = "*i8" if kernel.int8 else f"*{kernel.dtype}"
    types = {"q_ptr": f"*{kernel.dtype}", "k_ptr": kv, "v_ptr": kv, "scale": "fp32", "cap_log2": "fp32"}
    types |= dict.fromkeys(["out_ptr", "lse_ptr", "part_out_ptr", "part_lse_ptr"], "*fp32")
    types |= dict.fromkeys(["tables_ptr", "work_ptr", "first_keys_ptr"], "*i32")
    types |= dict.fromkeys(["k_scales_ptr", "v_scales_ptr"], "*fp32")
    types |= dict.fromkeys(["kv_heads", "table_stride"], "i32")
    types |= dict.fromkeys(["k_block_stride", "v_block_stride"], "i64")
    tiles = tiles_of(processor, kernel)
    constants = {
        "GROUP": 4, "D": kernel.d, "D_PADDED": padded(kernel.d), "D_V": kernel.d, "V_PADDED": padded(kernel.d),
        "V_TOKEN": kernel.d, "BLOCK_TOKENS": kernel.block_tokens,
        "TILE_ROWS": tiles.rows, "TILE_TOKENS": tiles.tokens, "INT8": kernel.int8, "UPCAST": False,
    }  # fmt: skip
    constants |= {} if kernel.windows else {"first_keys_ptr": None}
    constants |= {} if kernel.capped else {"cap_log2": None}
    return compile_for(processor, triton_jit.attend, types, constants | dict.fromkeys(ones, 1), **tiles.options())


@cache
def attend_for(processor: str, kernel: Kernel) -> Any:
    return compile_attend(processor, kernel)


def run_tool(name: str, compiled: Any, *options: str) -> str:
    with TemporaryDirectory() as folder:
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(compiled.asm["cubin"])
        return subprocess.run([TOOLS / name, *options, binary], capture_output=True, text=True, check=True).stdout


def spills_and_registers(processor: str, compiled: Any) -> tuple[int, int]:
    """Spilled bytes (AMD: registers), and registers of a thread."""
    if PROCESSORS[processor].family == "rocm":
        names = "vgpr_spill_count", "vgpr_count"
        spills, registers = (re.search(rf"\.{name}:\s*(\d+)", compiled.asm["amdgcn"]) for name in names)
        assert spills is not None
        assert registers is not None
        return max(0, int(spills[1]) - ROCM_SPILLS), int(registers[1])
    text = run_tool("cuobjdump", compiled, "--dump-resource-usage")
    usage = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return usage["STACK"] + usage["LOCAL"], usage["REG"]  # spilled registers are on the stack


def buffers(compiled: Any, tiles: Tiles) -> int:
    """Number of key buffers that the compiler keeps in shared memory, so that loads run ahead of arithmetic."""
    found = re.findall(rf"local_alloc : \(\) -> !ttg.memdesc<(\d+)x{tiles.tokens}x\d+x\w+", compiled.asm["ttgir"])
    return min(map(int, found), default=0)


@everywhere
def test_attention_fits_the_processor(processor: str, kernel: Kernel) -> None:
    compiled = attend_for(processor, kernel)
    assert compiled.metadata.shared <= PROCESSORS[processor].shared
    spills, registers = spills_and_registers(processor, compiled)
    assert spills == 0
    if kernel.few and kernel.dtype != "fp32":
        assert registers <= (256 if processor == "gfx942" else FEW_REGISTERS)


@pytest.mark.parametrize(
    ("processor", "kernel"), [one for one in PAIRS if one[1].dtype != "fp32" and not one[1].int8], ids=str
)
def test_keys_are_loaded_ahead_sixteen_bytes_at_a_time(processor: str, kernel: Kernel) -> None:
    compiled, tiles = attend_for(processor, kernel), tiles_of(processor, kernel)
    assert buffers(compiled, tiles) >= (2 if tiles.stages > 2 else 1)
    if processor == "gfx942":
        loads = re.findall(r"(?:global|buffer)_load_(\w+)", compiled.asm["amdgcn"])
        tables = 2 * tiles.tokens if kernel.block_tokens < tiles.tokens else 2
        assert sum(load != "dwordx4" for load in loads) <= tables
        return
    assert compiled.asm["ttgir"].count("async_wait") >= 2
    copies = re.findall(r"LDGSTS\S*", run_tool("nvdisasm", compiled))
    keys = [copy for copy in copies if copy.endswith(".128")]
    assert len(keys) >= 2 * tiles.stages
    assert len(copies) - len(keys) <= (4 * tiles.stages if kernel.block_tokens < tiles.tokens else 0)


@pytest.mark.parametrize(("processor", "kernel"), [one for one in PAIRS if one[1].dtype != "fp32"], ids=str)
def test_products_run_on_tensor_cores(processor: str, kernel: Kernel) -> None:
    compiled = attend_for(processor, kernel)
    wide = {"sm_80": "mma.sync", "sm_90": "wgmma", "sm_100": "tcgen05.mma", "gfx942": "v_mfma"}
    unit = "mma.sync" if kernel.few and processor != "gfx942" else wide[processor]
    assert unit in compiled.asm["amdgcn" if processor == "gfx942" else "ptx"]


@pytest.mark.parametrize("processor", ["sm_80", "gfx942"])
def test_one_query_of_one_kv_head_compiles(processor: str) -> None:
    """Triton makes every argument that is 1 a constant."""
    assert compile_attend(processor, USUAL[0], ones=("kv_heads",))


@pytest.mark.parametrize("ones", [(), ("heads", "kv_heads")], ids=["many-heads", "one-head"])
@pytest.mark.parametrize("processor", PROCESSORS)
def test_merge_and_append_compile(processor: str, ones: tuple[str, ...]) -> None:
    types = dict.fromkeys(["parts_ptr", "out_ptr", "lse_ptr"], "*fp32")
    types |= dict.fromkeys(["tokens_ptr", "entries_ptr"], "*i32") | {"heads": "i32"}
    sizes = {"D": 128, "D_PADDED": 128}
    values = {"D_V": 128, "V_PADDED": 128}
    constants = sizes | {"CHUNK": triton_batch.MERGE_CHUNK} | dict.fromkeys(["heads"] if ones else [], 1)
    merge = compile_for(processor, triton_merge.merge_partials, types, constants, **triton_batch.MERGE_OPTIONS)
    types = dict.fromkeys(["k_ptr", "v_ptr", "k_pool_ptr", "v_pool_ptr"], "*bf16") | {"slots_ptr": "*i32"}
    types |= {"kv_heads": "i32", "k_block_stride": "i64", "v_block_stride": "i64"}
    constants = sizes | values | {"BLOCK_TOKENS": 64} | dict.fromkeys(["kv_heads"] if ones else [], 1)
    append = compile_for(processor, triton_jit.append, types, constants, **triton_batch.APPEND_OPTIONS)
    for compiled in (merge, append):
        assert compiled.metadata.shared <= 16 << 10
        assert spills_and_registers(processor, compiled)[0] == 0
