"""The part of the device that C++ needs: a guard, which knows the current device. Compiled once for each torch."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shlex
import shutil
import subprocess
from functools import cache
from pathlib import Path

import torch
from filelock import FileLock
from torch.utils import cpp_extension

_SOURCE = Path(__file__).with_name("guard.cpp")
_BUILD = Path(__file__).parents[2] / "build" / "emulated"


def _compiler() -> list[str]:
    """The C++ compiler: CXX if that is set."""
    return shlex.split(os.environ.get("CXX", "")) or ["g++" if shutil.which("g++") else "c++"]


def missing() -> str:
    """Why the emulated device cannot be used here; empty if it can."""
    if torch.backends.cuda.is_built():
        return "the emulated device takes the place of CUDA, but this torch was built with CUDA"
    if shutil.which(_compiler()[0]) is None:
        return "the emulated device needs a C++ compiler (g++, or what CXX names)"
    return ""


@cache
def _library() -> ctypes.CDLL:
    """The compiled guard; the first process that needs it compiles it, which takes a few seconds."""
    key = hashlib.sha256(f"{torch.__version__} {_compiler()}".encode() + _SOURCE.read_bytes()).hexdigest()[:16]
    library = _BUILD / f"guard-{key}.so"
    _BUILD.mkdir(parents=True, exist_ok=True)
    with FileLock(library.with_suffix(".lock")):
        if not library.exists():
            made = library.with_suffix(".new")
            includes = [f"-I{path}" for path in cpp_extension.include_paths()]
            libraries = [f"-L{path}" for path in cpp_extension.library_paths()]
            flags = ["-std=c++20", "-O1", "-shared", "-fPIC", *includes, *libraries]
            subprocess.run([*_compiler(), *flags, str(_SOURCE), "-lc10", "-o", str(made)], check=True)
            made.rename(library)
    return ctypes.CDLL(str(library))


def set_guard(on: bool) -> None:
    """Let C++ find a CUDA device, or none, as in torch without CUDA."""
    _library().emulated_guard(ctypes.c_bool(on))
