"""The Triton kernels compile for real GPUs, without spills and within their registers and shared memory.

Compiling needs no GPU. A spill would make the kernel slow on a real one, an oversized tile would not launch at all.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed: pip install distkv-dask[gpu]")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from distkv_dask.kernels import triton_jit, triton_kernel  # noqa: E402

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1 replaces the compiler by the interpreter", allow_module_level=True)

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_LIMIT = {"sm_80": 163 << 10, "sm_90": 227 << 10, "gfx942": 64 << 10}
FEW_ROWS_REGISTERS = 168  # three blocks of four warps on a processor; int8 needs more for its conversions
GFX942_SPILLS = 8  # registers

CASES = [
    # few rows, head dim, causal, int8, dtype
    (True, 64, False, False, "bf16"),
    (True, 80, False, False, "bf16"),
    (True, 96, False, False, "bf16"),
    (True, 128, False, False, "bf16"),
    (True, 128, False, True, "bf16"),
    (True, 256, False, False, "bf16"),
    (True, 256, False, True, "bf16"),
    (True, 256, False, False, "fp32"),
    (False, 64, True, False, "bf16"),
    (False, 128, True, False, "bf16"),
    (False, 128, False, False, "fp16"),
    (False, 128, True, False, "fp32"),
    (False, 256, True, False, "fp32"),
    (False, 80, True, False, "bf16"),
    (False, 64, True, True, "bf16"),
    (False, 128, True, True, "bf16"),
    (False, 256, True, True, "bf16"),
    (False, 256, True, False, "bf16"),
]


def compile_for(target: GPUTarget, function: Any, types: dict[str, str], constants: dict[str, Any], **options: Any):
    names = function.arg_names
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    constexprs = {(names.index(name),): value for name, value in constants.items()}
    aligned = [name for name in names if signature[name].startswith("*") or name.endswith("_stride")]
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned if name != "table_stride"}
    source = ASTSource(fn=function, signature=signature, constexprs=constexprs, attrs=attributes)
    return triton.compile(source, target=target, options=options)


def compile_attend(
    target: str, few: bool, d: int, causal: bool, int8: bool, dtype: str, ones: tuple[str, ...] = ()
) -> Any:
    torch_dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    tiles = triton_kernel.tiles_for(4 if few else 512, d, torch_dtype, int8)
    kv = "*i8" if int8 else f"*{dtype}"
    types = {"q_ptr": f"*{dtype}", "k_ptr": kv, "v_ptr": kv, "out_ptr": "*fp32", "lse_ptr": "*fp32"}
    types |= dict.fromkeys(["tables_ptr", "lengths_ptr", "offsets_ptr", "starts_ptr"], "*i32")
    types |= dict.fromkeys(["k_scales_ptr", "v_scales_ptr"], "*fp32")
    types |= dict.fromkeys(["tokens", "kv_heads", "table_stride"], "i32")
    types |= {"scale_log2": "fp32", "k_block_stride": "i64", "v_block_stride": "i64"}
    constants = {
        "GROUP": 4, "D": d, "D_PADDED": triton_kernel.padded(d), "BLOCK_TOKENS": 64, "TILE_ROWS": tiles.rows,
        "TILE_TOKENS": tiles.tokens, "SPLITS": 8 if few else 1, "RAGGED": not few, "CAUSAL": causal, "INT8": int8,
        "UPCAST": False,
    }  # fmt: skip
    for name in ones:
        constants[name] = 1
    return compile_for(TARGETS[target], triton_jit.attend, types, constants, **tiles.options())


def cuda_usage(compiled: Any, folder: Path) -> dict[str, int]:
    binary = folder / "kernel.cubin"
    binary.write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    text = subprocess.run([tool, "--dump-resource-usage", binary], capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
@pytest.mark.parametrize("target", TARGETS)
def test_attention_fits_the_processor(target: str, case: tuple[Any, ...], tmp_path: Path) -> None:
    few, _, _, int8, dtype = case
    compiled = compile_attend(target, *case)
    assert compiled.metadata.shared <= SHARED_LIMIT[target]
    if target == "gfx942":
        assembly = compiled.asm["amdgcn"]
        spills = int(re.search(r"\.vgpr_spill_count:\s*(\d+)", assembly)[1])
        assert spills <= GFX942_SPILLS
        assert "v_mfma" in assembly
    else:
        usage = cuda_usage(compiled, tmp_path)
        assert usage["STACK"] == usage["LOCAL"] == 0  # spilled registers lie on the stack
        assert usage["REG"] <= (FEW_ROWS_REGISTERS if few and not int8 and dtype != "fp32" else 255)


@pytest.mark.parametrize("target", TARGETS)
def test_one_query_of_one_kv_head_compiles(target: str) -> None:
    """Triton makes a constant of every number that is 1."""
    assert compile_attend(target, True, 64, False, False, "bf16", ones=("tokens", "kv_heads", "table_stride"))


@pytest.mark.parametrize("target", TARGETS)
def test_merge_compiles(target: str) -> None:
    types = dict.fromkeys(["part_out_ptr", "part_lse_ptr", "out_ptr", "lse_ptr"], "*fp32") | {"rows": "i32"}
    constants = {"D": 128, "D_PADDED": 128, "SPLITS": 48, "SPLITS_PADDED": 64}
    compiled = compile_for(TARGETS[target], triton_jit.merge_splits, types, constants, **triton_kernel.MERGE_OPTIONS)
    assert compiled.metadata.shared <= SHARED_LIMIT[target]
