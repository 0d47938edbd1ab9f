"""AMX: the tile instructions in software, and that the core has the real ones and uses them only where it may."""

from __future__ import annotations

import ctypes
import runpy
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import setuptools
import torch
from setuptools.dist import Distribution
from setuptools.errors import CompileError
from test_fast_kernels import ROWS, ragged

from distkv_dask.kernels import IMPLEMENTATIONS, micro_attention, native_kernel

ROOT = Path(__file__).resolve().parents[2]
NATIVE = ROOT / "kernels" / "native"
TILED = [name for name in IMPLEMENTATIONS if "amx" in name]
TILES = ["-mamx-tile", "-mamx-bf16"]
AMX = {"isa_amx_bf16", "linear_amx_bf16"}
LIBRARY = """
#define DISTKV_ISA test
#include "amx_model.h"
using namespace distkv::test;
extern "C" void configure(const void* config) { _tile_loadconfig(config); }
extern "C" void release() { _tile_release(); }
extern "C" void multiply(const void* a, const void* b, void* c) {
  _tile_loadd(0, c, 64);
  _tile_loadd(1, a, 64);
  _tile_loadd(2, b, 64);
  _tile_dpbf16ps(0, 1, 2);
  _tile_stored(0, c, 64);
}
"""


def compiler_takes(*flags: str) -> bool:
    command = ["g++", *flags, "-fsyntax-only", "-x", "c++", "/dev/null"]
    return shutil.which("g++") is not None and subprocess.run(command, capture_output=True).returncode == 0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not compiler_takes():
        pytest.skip("no compiler here")
    library = tmp_path_factory.mktemp("amx") / "model.so"
    command = ["g++", "-std=c++17", "-O1", "-shared", "-fPIC", f"-I{NATIVE}", "-x", "c++", "-", "-o", str(library)]
    subprocess.run(command, input=LIBRARY, text=True, check=True)
    return library


def config(rows: Sequence[int], row_bytes: Sequence[int]) -> bytes:
    """Tiles of a palette-1 configuration, with the layout of the manual."""
    memory = bytearray(64)
    memory[0] = 1
    for tile, (count, size) in enumerate(zip(rows, row_bytes, strict=True)):
        memory[16 + 2 * tile] = size
        memory[48 + tile] = count
    return bytes(memory)


def numbers(seed: int, shape: tuple[int, int]) -> np.ndarray[Any, Any]:
    """Floats whose lower half is zero (bf16), including denormals and numbers with denormal products."""
    draw = np.random.default_rng(seed)
    exponents = draw.choice([0, 0, 1, -3, -60, -70, -126, -130], shape)
    values = (draw.standard_normal(shape) * 2.0**exponents).astype(np.float32)
    return (values.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)


def flushed(x: float) -> float:
    return 0.0 if abs(x) < 2.0**-126 else x


@pytest.mark.parametrize(("m", "k", "n"), [(16, 32, 16), (5, 12, 3), (16, 2, 16), (1, 32, 7)])
def test_the_dot_product_in_software_is_that_of_the_manual(model: Path, m: int, k: int, n: int) -> None:
    library, fma = ctypes.CDLL(str(model)), ctypes.CDLL("libm.so.6").fmaf
    fma.restype, fma.argtypes = ctypes.c_float, [ctypes.c_float] * 3
    a, b = numbers(1, (m, k)), numbers(2, (k, n))
    c = np.random.default_rng(3).standard_normal((m, n)).astype(np.float32)
    c[0, 0] = 2.0**-130
    expected = np.zeros_like(c)
    for row in range(m):
        for column in range(n):
            sums = [0.0, 0.0]
            for at in range(k):
                x, y = flushed(float(a[row, at])), flushed(float(b[at, column]))
                sums[at % 2] = flushed(fma(x, y, sums[at % 2]))
            total = flushed(float(np.float32(sums[0]) + np.float32(sums[1])))
            expected[row, column] = flushed(float(np.float32(flushed(float(c[row, column]))) + np.float32(total)))
    left, right, result = (
        np.full((16, 32), 7, np.uint16),
        np.full((16, 32), 7, np.uint16),
        np.full((16, 16), 7, np.float32),
    )
    left[:m, :k] = a.view(np.uint32) >> 16
    pairs = (b.view(np.uint32) >> 16).astype(np.uint16).reshape(k // 2, 2, n)
    right[: k // 2, : 2 * n] = pairs.transpose(0, 2, 1).reshape(k // 2, 2 * n)
    result[:m, :n] = c
    library.configure(config([m, m, k // 2], [4 * n, 2 * k, 4 * n]))
    library.multiply(left.ctypes.data_as(ctypes.c_void_p), right.ctypes.data_as(ctypes.c_void_p),
                     result.ctypes.data_as(ctypes.c_void_p))  # fmt: skip
    library.release()
    assert np.array_equal(result[:m, :n].view(np.uint32), expected.view(np.uint32))
    result[:m, :n] = 7
    assert (result == 7).all(), "it wrote outside its rows and columns"


WHOLE = config([16] * 8, [64] * 8)


@pytest.mark.parametrize(
    "calls",
    [
        "library.multiply(memory, memory, memory)",
        f"library.configure({WHOLE!r}); library.configure({WHOLE!r})",
        f"library.configure({WHOLE!r}); library.release(); library.multiply(memory, memory, memory)",
        f"library.configure({config([16] * 3, [64, 64, 32])!r}); library.multiply(memory, memory, memory)",
        f"library.configure({config([17], [64])!r})",
    ],
    ids=["not-configured", "never-released", "released", "sizes-that-do-not-fit", "too-many-rows"],
)
def test_software_tiles_end_a_process_that_uses_them_wrong(model: Path, calls: str) -> None:
    script = f"import ctypes\nlibrary = ctypes.CDLL({str(model)!r})\nmemory = bytes(1024)\n{calls}\nprint('done')"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode < 0
    assert "done" not in done.stdout


@pytest.mark.parametrize("implementation", TILED)
def test_neither_threads_nor_other_rows_change_a_bit_and_tiles_are_released(implementation: str) -> None:
    rows = ROWS[2:5]
    alone = [micro_attention(**ragged([row], "window", torch.bfloat16), implementation=implementation) for row in rows]
    for threads in (3, 1):
        out, lse = micro_attention(
            **ragged(rows, "window", torch.bfloat16), threads=threads, implementation=implementation
        )
        assert torch.equal(out, torch.cat([one for one, _ in alone]))
        assert torch.equal(lse, torch.cat([one for _, one in alone]))


def test_the_core_has_the_processors_own_tile_instructions() -> None:
    if native_kernel.missing() is not None or shutil.which("objdump") is None or not compiler_takes(*TILES):
        pytest.skip("no core, or no tools that know tiles")
    core = native_kernel.path()
    listing = subprocess.run(["objdump", "-d", "--no-show-raw-insn", str(core)], capture_output=True, text=True).stdout
    for instruction in ("ldtilecfg", "tilerelease", "tileloadd", "tilezero", "tdpbf16ps", "tilestored"):
        assert f"\t{instruction}" in listing, instruction


def test_tiles_serve_only_where_the_processor_has_them() -> None:
    if native_kernel.missing() is not None:
        pytest.skip("no core")
    flags = Path("/proc/cpuinfo")
    has = flags.exists() and "amx_bf16" in flags.read_text()
    assert has or "amx_bf16" not in native_kernel.instruction_sets()
    assert not {"amx_model", "amx_model_avx512"} & set(native_kernel.instruction_sets()), "software is never chosen"
    for dtype, many in ((torch.float32, True), (torch.int8, True), (torch.bfloat16, False)):
        assert "amx_bf16" not in native_kernel.instruction_sets(dtype, many=many)


class OldCompiler:
    """A compiler that does not support some flags; records what was compiled with which macros, and what was linked."""

    def __init__(self, *unknown: str) -> None:
        self.unknown, self.macros, self.linked = unknown, dict[str, set[str]](), list[str]()

    def compile(
        self, sources: list[str], macros: list[tuple[str, None]], extra_postargs: list[str], **_: Any
    ) -> list[str]:
        if set(self.unknown) & set(extra_postargs):
            raise CompileError("unrecognized command-line option")
        self.macros |= {Path(source).name: {name for name, _ in macros} for source in sources}
        return [Path(source).stem for source in sources]

    def link_shared_object(self, objects: list[str], *_: Any, **__: Any) -> None:
        self.linked = objects


@pytest.mark.parametrize(
    ("unknown", "missing", "left"),
    [
        ((), set(), {"DISTKV_HAS_AVX512_BF16", "DISTKV_HAS_AMX_BF16"}),
        (TILES, AMX, {"DISTKV_HAS_AVX512_BF16"}),
        (["-mavx512bf16"], {*AMX, "isa_avx512_bf16", "isa_amx_model_avx512", "linear_avx512_bf16"}, set()),
    ],
    ids=["new", "without-tiles", "without-bf16"],
)
def test_a_compiler_that_does_not_know_tiles_builds_the_rest(
    unknown: Sequence[str], missing: set[str], left: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.chdir(ROOT)
    build = runpy.run_path("setup.py")
    compiler = OldCompiler(*unknown)
    command = build["BuildCore"](Distribution())
    command.compiler, command.build_temp, command.get_ext_fullpath = compiler, "", lambda name: name
    command.build_extension(build["core"])
    assert {Path(source).stem for source in build["core"].sources} - set(compiler.linked) == missing
    assert compiler.macros["choose.cpp"] == left


def test_without_tiles_and_bf16_the_choice_of_kernels_needs_nothing_that_was_left_out(tmp_path: Path) -> None:
    if not compiler_takes() or shutil.which("nm") is None:
        pytest.skip("no compiler here")
    made = tmp_path / "choose.o"
    subprocess.run(["g++", "-std=c++17", "-c", str(NATIVE / "choose.cpp"), "-o", str(made)], check=True)
    wanted = subprocess.run(["nm", "-C", "--undefined-only", str(made)], capture_output=True, text=True).stdout
    assert "kPortable" in wanted
    assert "kAmxModel" in wanted
    assert not {"distkv::kAmxBf16", "distkv::kAvx512Bf16", "distkv::kAmxModelAvx512"} & set(wanted.split())
