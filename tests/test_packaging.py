"""The package as users install it: contents of the wheel, use outside of the checkout, and requirements."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

import distkv_dask
from distkv_dask.kernels import native_kernel
from distkv_dask.worker.native.wire import wire

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
# Packages with other names in conda, and those that only conda or only the Makefile lists.
CONDA_NAMES = {
    "cupy-cuda12x": "cupy",
    "duckdb": "python-duckdb",
    "distributed-ucxx-cu12": "distributed-ucxx",
    "huggingface-hub": "huggingface_hub",
    "msgpack": "msgpack-python",
    "prometheus-client": "prometheus_client",
    "torch": "pytorch",
    "ucxx-cu12": "ucxx",
}
CONDA_ONLY = {"python", "pip", "cuda-version"}


def requirements(lines):
    return {(r := Requirement(line)).name.lower(): r.specifier for line in lines}


def clean_environment():
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel built from a copy of the checkout, with the build tools of this environment."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, copy)
    for name in ("distkv_dask", "kernels", "graphs"):
        ignored = shutil.ignore_patterns("__pycache__", "*.so")
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=ignored)
    build = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"
    out = tmp_path_factory.mktemp("wheel")
    done = subprocess.run(
        [sys.executable, "-c", build, str(out)],
        cwd=copy,
        env=clean_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (built,) = out.glob("*.whl")
    return built


@pytest.mark.thorough  # compiles the core once more
def test_wheel_holds_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {Path(name) for name in archive.namelist()}
    tops = {name.parts[0] for name in names}
    info = f"distkv_dask-{distkv_dask.__version__}.dist-info"
    assert tops == {"distkv_dask", info}
    assert Path(info, "licenses", "LICENSE") in names
    walked = os.walk(ROOT / "distkv_dask", followlinks=True)
    sources = {(Path(at) / file).relative_to(ROOT) for at, _, files in walked for file in files}
    expected = {path for path in sources if path.suffix in {".py", ".yaml", ".typed"}}
    assert {path for path in names if path.suffix in {".py", ".yaml", ".typed"}} == expected
    assert {Path("distkv_dask/kernels/__init__.py"), Path("distkv_dask/graphs/__init__.py")} <= names


@pytest.mark.thorough
@pytest.mark.skipif(shutil.which("g++") is None, reason="without a compiler the wheel has no C++ core")
def test_wheel_built_with_a_compiler_holds_the_fast_kernels(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    for library in (r"distkv_dask/kernels/_core\..*so", r"distkv_dask/worker/native/_wire\..*so"):
        assert [name for name in names if re.fullmatch(library, name)], library


@pytest.mark.skipif(shutil.which("g++") is None, reason="without a compiler there is no C++")
def test_what_the_compiler_built_is_what_this_checkout_loads():
    """Nothing else would show it: without a library everything works, only slower."""
    assert native_kernel.missing() is None
    assert wire() is not None


@pytest.mark.thorough
def test_installed_wheel_works_away_from_the_checkout(wheel, tmp_path):
    """A new environment with our dependencies (through a path entry, which runs no editable hook) and the wheel."""
    venv.create(tmp_path / "env", with_pip=False)
    python = tmp_path / "env" / "bin" / "python"
    (site,) = (tmp_path / "env" / "lib").glob("python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    code = f"""
import torch, distkv_dask, distkv_dask.graphs
from distkv_dask.config import Config
from distkv_dask.kernels import micro_attention
assert distkv_dask.__file__.startswith({str(site)!r}), distkv_dask.__file__
assert Config.load().block_tokens == 64
pool = torch.ones(1, 1, 4, 8)
out, lse = micro_attention(
    q=torch.ones(1, 2, 8),
    k_pool=pool,
    v_pool=pool,
    block_tables=torch.zeros(1, 1, dtype=torch.int32),
    lengths=torch.tensor([3], dtype=torch.int32),
    scale=0.5,
)
torch.testing.assert_close(out, torch.ones(1, 2, 8))
torch.testing.assert_close(lse, torch.full((1, 2), 4.0) + torch.tensor(3.0).log())
print("works")
"""
    done = subprocess.run(
        [python, "-c", code], cwd=tmp_path, env=clean_environment(), capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "works", done.stderr


def test_conda_users_get_the_same_versions_as_pip_users():
    everything = requirements(line for lines in (PROJECT["dependencies"], *EXTRAS.values()) for line in lines)
    everything["python"] = Requirement(f"python{PROJECT['requires-python']}").specifier
    conda = requirements(yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"])
    expected = {CONDA_NAMES.get(name, name): specifier for name, specifier in everything.items()}
    assert {name: s for name, s in conda.items() if name not in CONDA_ONLY - {"python"}} == expected


def test_every_requirement_has_a_tested_pin_within_its_range():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = {(r := Requirement(x)).name.lower(): str(r.specifier)[2:] for x in lines if x and x[0] != "#"}
    everything = requirements(line for group in (PROJECT["dependencies"], *EXTRAS.values()) for line in group)
    assert pins.keys() == everything.keys()
    assert not [name for name, specifier in everything.items() if pins[name] not in specifier]


def test_a_build_fetches_nothing_but_what_it_imports():
    """Build tools are installed into their own environment, whatever else is installed."""
    tree = ast.parse((ROOT / "setup.py").read_text())
    modules = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    modules += [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    imported = {name.partition(".")[0] for name in modules} - sys.stdlib_module_names
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]
    assert requirements(build["requires"]).keys() == imported
    assert build["build-backend"].partition(".")[0] in imported


def test_the_makefile_installs_the_pinned_torch_first():
    (pin,) = re.findall(r"^torch==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    installs = re.findall(r"\(PIP\) install (.*)", (ROOT / "Makefile").read_text())
    assert installs[0].endswith(f"torch=={pin}")


@pytest.mark.thorough
def test_everything_can_be_collected_as_make_test_does():
    """``make test`` installs no ucxx, ``make test-all`` does: nothing else collects the tests without it."""
    script = "import sys, pytest; sys.modules['ucxx'] = None; sys.exit(pytest.main(['-q', '-q', '--collect-only']))"
    found = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert found.returncode == 0, found.stdout[-2000:]
