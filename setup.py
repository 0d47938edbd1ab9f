"""Builds the two C++ libraries, where a compiler exists; everything else about the package is in pyproject.toml.

They are plain shared libraries that ctypes loads: the kernels' core (kernels/native_kernel.py), of which each isa_*.cpp
is compiled for its own instruction set and chosen at run time, and the exchange of a layer over sockets
(distkv_dask/worker/native/wire.py). A failed build is reported and skipped: PyTorch kernels and Python serve then.
"""

from __future__ import annotations

import os
import platform
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

SOURCES = Path("kernels/native")
FLAGS = [
    "-std=c++17",
    "-O3",
    "-fno-math-errno",
    "-ffp-contract=fast",
    "-fvisibility=hidden",
    "-fPIC",
    "-g0",
    "-Wno-uninitialized",
]
AVX512 = ["-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
X86 = {
    "isa_avx2.cpp": ["-mavx2", "-mfma", "-mf16c"],
    "isa_avx512.cpp": AVX512,
    "isa_avx512_bf16.cpp": [*AVX512, "-mavx512bf16"],
    "isa_amx_model_avx512.cpp": [*AVX512, "-mavx512bf16"],
    "isa_amx_bf16.cpp": [*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"],
    "elementwise_avx512.cpp": AVX512,
    "linear_avx512.cpp": AVX512,
    "linear_avx512_bf16.cpp": [*AVX512, "-mavx512bf16"],
    "linear_amx_bf16.cpp": [*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"],
}
ARM = {"isa_neon.cpp": [], "isa_neon_bf16.cpp": ["-march=armv8.2-a+bf16"]}
ISA_FLAGS = X86 | ARM
SETS = {"x86_64": X86, "amd64": X86, "aarch64": ARM, "arm64": ARM}.get(platform.machine().lower(), {})
# Sources that need a new compiler, and what tells choose.cpp that they are there. Each has
# the flags of the set that its kernels fall back on, too: where that one cannot be built, it cannot be either.
OPTIONAL = {
    "isa_avx512_bf16.cpp": "DISTKV_HAS_AVX512_BF16",
    "isa_amx_model_avx512.cpp": "DISTKV_HAS_AVX512_BF16",
    "isa_amx_bf16.cpp": "DISTKV_HAS_AMX_BF16",
    "isa_neon_bf16.cpp": "DISTKV_HAS_NEON_BF16",
    "linear_avx512_bf16.cpp": "DISTKV_HAS_AVX512_BF16",
    "linear_amx_bf16.cpp": "DISTKV_HAS_AMX_BF16",
}
PORTABLE = [
    *("api.cpp", "layers.cpp", "pool.cpp", "read.cpp", "isa_portable.cpp", "isa_amx_model.cpp", "choose.cpp"),
    *("linear.cpp", "linear_amx_model.cpp", "decoder_layer.cpp", "elementwise_portable.cpp"),
]
WIRE = Path("distkv_dask/worker/native")
MOST_COMPILERS = 8
"""Of g++ at once: each takes up to half a GB."""


class BuildCore(build_ext):
    """Compile every source with the flags of its instruction set, several at once."""

    def build_extension(self, ext: Extension) -> None:
        """Compile and link the core; setuptools skips it on an error because it is optional."""
        optional = [source for source in ext.sources if Path(source).name in OPTIONAL]
        others = [source for source in ext.sources if source not in optional]
        with ThreadPoolExecutor(min(os.cpu_count() or 1, MOST_COMPILERS)) as compilers:
            built = [objects for objects in compilers.map(self.compile_optional, optional) if objects]
            macros = [(OPTIONAL[f"{Path(made).stem}.cpp"], None) for (made,) in built]
            built += compilers.map(partial(self.compile_source, macros=macros), others)
        target = self.get_ext_fullpath(ext.name)
        objects = [made for objects in built for made in objects]
        self.compiler.link_shared_object(objects, target, extra_postargs=["-pthread"], target_lang="c++")

    def compile_source(self, source: str, macros: list[tuple[str, None]]) -> list[str]:
        """Compile one source; its object file."""
        flags = FLAGS + ISA_FLAGS.get(Path(source).name, [])
        return self.compiler.compile([source], output_dir=self.build_temp, macros=macros, extra_postargs=flags)

    def compile_optional(self, source: str) -> list[str]:
        """Compile a source that needs a new compiler; nothing where this one is too old."""
        try:
            return self.compile_source(source, [])
        except CompileError:
            name = Path(source).name
            print(f"{name} is left out: this compiler does not know {' '.join(ISA_FLAGS[name])}")
            return []


sources = [str(SOURCES / name) for name in (*SETS, *PORTABLE)]
core = Extension("distkv_dask.kernels._core", sources, optional=True, language="c++")
core.depends = [str(path) for path in sorted(SOURCES.glob("*.h"))]
wire = Extension(
    "distkv_dask.worker.native._wire",
    [str(WIRE / name) for name in ("holder.cpp", "home.cpp")],
    depends=[*map(str, sorted(WIRE.glob("*.h"))), str(SOURCES / "exports.h")],
    optional=True,
    language="c++",
)
setup(ext_modules=[core, wire] if sys.platform == "linux" else [core], cmdclass={"build_ext": BuildCore})
