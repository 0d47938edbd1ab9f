"""The core for Arm: it compiles, has bf16 dot products, and gives the float64 answer in an emulator."""

from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path

import pytest
import torch
from attention_cases import TOLERANCE, build, named

from distkv_dask.kernels import micro_attention

NATIVE = Path(__file__).resolve().parents[2] / "kernels" / "native"
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
pytestmark = [
    pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"no {COMPILER} here"),
    pytest.mark.slow,  # compiles the core
]
SOURCES = {
    **dict.fromkeys(("api", "choose", "pool", "isa_portable", "isa_amx_model", "isa_neon"), ()),
    "isa_neon_bf16": ("-march=armv8.2-a+bf16",),
}
# Reads a call from stdin, with 0 or 1 instead of pointers, followed by the data behind them; writes out and lse.
DRIVER = """
#include <cstdio>
#include <cstring>
#include <vector>
#include "core.h"
extern "C" int distkv_attend(const distkv::Args* args, const char* isa);
extern "C" int distkv_has_isa(const char* name);
int main(int, char** argv) {
  distkv::Args args;
  int64_t sizes[12];
  if (!distkv_has_isa(argv[1])) return 9;
  if (fread(&args, sizeof args, 1, stdin) != 1 || fread(sizes, 8, 12, stdin) != 12) return 8;
  std::vector<std::vector<char>> memory(12);
  const void* pointers[12];
  for (int i = 0; i < 12; ++i) {
    memory[i].resize(sizes[i]);
    if (sizes[i] && i < 10 && fread(memory[i].data(), sizes[i], 1, stdin) != 1) return 8;
    pointers[i] = sizes[i] ? memory[i].data() : nullptr;
  }
  std::memcpy(static_cast<void*>(&args), pointers, sizeof pointers);
  if (const int status = distkv_attend(&args, argv[1])) return status;
  for (int i = 10; i < 12; ++i) fwrite(memory[i].data(), sizes[i], 1, stdout);
}
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The core and the driver, linked statically; choose.cpp includes the bf16 dot product, as in setup.py."""
    folder = tmp_path_factory.mktemp("arm")
    flags = ["-std=c++17", "-O1", "-ffp-contract=fast", "-Wno-uninitialized", "-DDISTKV_HAS_NEON_BF16", f"-I{NATIVE}"]
    (folder / "driver.cpp").write_text(DRIVER)
    compiling = [
        subprocess.Popen([COMPILER, *flags, *more, "-c", str(NATIVE / f"{name}.cpp"), "-o", str(folder / f"{name}.o")])
        for name, more in SOURCES.items()
    ]
    assert [one.wait() for one in compiling] == [0] * len(SOURCES)
    objects = [str(folder / f"{name}.o") for name in SOURCES]
    made = [COMPILER, *flags, "-static", "-pthread", str(folder / "driver.cpp"), *objects, "-o", str(folder / "driver")]
    subprocess.run(made, check=True)
    return folder / "driver"


def test_scores_and_tiles_use_the_bf16_dot_product(program: Path) -> None:
    tool = shutil.which("aarch64-linux-gnu-objdump")
    if tool is None:
        pytest.skip("no objdump for Arm")
    for name, has in (("isa_neon_bf16", True), ("isa_neon", False)):
        listing = subprocess.run(
            [tool, "-d", str(program.with_name(f"{name}.o"))], capture_output=True, text=True
        ).stdout
        assert ("\tbfdot" in listing) is has
        assert "\tfmla" in listing


@pytest.mark.skipif(shutil.which(EMULATOR) is None, reason=f"no {EMULATOR} here")
@pytest.mark.parametrize("isa", ["neon_bf16", "neon", "portable", "amx_model"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "name", ["decode-head-dim-80", "decode-int8", "prefill-head-dim-80", "prefill-soft-cap-50-with-a-window"]
)
def test_attention_equals_float64_on_arm(program: Path, isa: str, dtype: torch.dtype, name: str) -> None:
    arguments = build(named(name), dtype)
    q, k, v, tables = (arguments[each] for each in ("q", "k_pool", "v_pool", "block_tables"))
    k, v = k.contiguous(), v.contiguous()
    optional = [arguments.get(each) for each in ("query_offsets", "q_start", "first_keys", "k_scales", "v_scales")]
    given = [q, k, v, tables, arguments["lengths"], *optional]
    tensors = [b"" if one is None else one.contiguous().view(torch.uint8).numpy().tobytes() for one in given]
    (tokens, heads, d), (blocks, kv_heads, block_tokens, d_v) = q.shape, v.shape
    rows, max_blocks = tables.shape
    kinds = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2, torch.int8: 3}
    call = struct.pack(
        "<28q2d", *[0] * 12, rows, tokens, heads, kv_heads, d, block_tokens, blocks, max_blocks, tables.stride(0),
        k.stride(0), v.stride(0), d_v, v.stride(2), kinds[q.dtype], kinds[k.dtype], 1,
        arguments["soft_cap"] or 0.0, arguments["scale"],
    )  # fmt: skip
    outputs = [4 * tokens * heads * d_v, 4 * tokens * heads]
    sizes = struct.pack("<12q", *map(len, tensors), *outputs)
    command = [EMULATOR, "-cpu", "max", str(program), isa]
    done = subprocess.run(command, input=call + sizes + b"".join(tensors), capture_output=True, check=True)
    found = torch.frombuffer(bytearray(done.stdout), dtype=torch.float32)
    out, lse = found[: -tokens * heads].view(tokens, heads, d_v), found[-tokens * heads :].view(tokens, heads)
    expected_out, expected_lse = micro_attention(**arguments, implementation="reference")
    tolerance = TOLERANCE[dtype] * max(1.0, float(expected_out.abs().max()))
    torch.testing.assert_close(out, expected_out, rtol=0, atol=tolerance)
    torch.testing.assert_close(lse, expected_lse, rtol=2e-6, atol=TOLERANCE[dtype])
