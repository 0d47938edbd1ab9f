"""Imports point one way, and code that runs in the client or the scheduler never imports torch."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
# Folder of the package -> the other folders that it may import. "ground" is every module outside the folders.
ALLOWED = {
    "ground": {"ground"},
    "kernels": {"kernels"},
    "graphs": {"graphs", "ground"},
    "worker": {"worker", "ground", "kernels", "graphs"},
    "scheduler": {"scheduler", "ground", "graphs"},
    "client": {"client", "ground"},
    "simulate": {"simulate", "scheduler", "ground"},
}
# Import name -> distribution, if they differ.
DISTRIBUTIONS = {
    "docling": "docling-slim",
    "cupy": "cupy-cuda12x",
    "dask_cuda": "dask-cuda",
    "huggingface_hub": "huggingface-hub",
    "prometheus_client": "prometheus-client",
    "ucxx": "ucxx-cu12",
    "yaml": "pyyaml",
}
# Import names of packages that only an extra installs: a module that needs one may not be importable here.
EXTRAS = {"bokeh", "pandas", "prometheus_client", "selectolax", "starlette", "uvicorn", "webencodings"}
# Modules in which one process names the plugin that it installs in another.
INSTALLS = {"scheduler": "distkv_dask.worker.rmanager", "client": "distkv_dask.scheduler.gmanager"}
# Presets with which clients make estimates without a cluster.
FIGURES = {"client": "distkv_dask.scheduler.costs.presets"}


def sources():
    """Every module of the package as a path relative to the checkout, symbolic links followed."""
    found = os.walk(ROOT / "distkv_dask", followlinks=True)
    return sorted((Path(at) / name).relative_to(ROOT) for at, _, names in found for name in names if name[-3:] == ".py")


def folder(module):
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in ALLOWED else "ground"


def imported(source):
    """Full names of all modules that ``source`` imports at run time (imports for type checkers do not count)."""
    tree = ast.parse((ROOT / source).read_text())
    typing_only = {n for node in ast.walk(tree) if is_type_checking(node) for stmt in node.body for n in ast.walk(stmt)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import) and node not in typing_only:
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node not in typing_only:
            base = source.parent.parts[: len(source.parent.parts) - node.level + 1] if node.level else ()
            module = ".".join((*base, node.module) if node.module else base)
            yield from (f"{module}.{alias.name}" for alias in node.names) if module == "distkv_dask" else [module]


def is_type_checking(node):
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def test_imports_point_one_way():
    wrong = []
    for source in sources():
        if source == Path("distkv_dask/__init__.py"):
            continue  # the public names, collected from all modules
        home = folder(".".join(source.with_suffix("").parts))
        allowed, named = ALLOWED[home], (INSTALLS.get(home), FIGURES.get(home))
        ours = [name for name in imported(source) if name.split(".")[0] == "distkv_dask"]
        wrong += [
            f"{source} ({home}) imports {name}" for name in ours if folder(name) not in allowed and name not in named
        ]
    assert wrong == []


@pytest.mark.parametrize("process", ["scheduler", "client", "simulate"])
def test_scheduler_and_client_start_without_torch(process):
    names = [".".join(s.with_suffix("").parts).removesuffix(".__init__") for s in sources() if s.parts[1] == process]
    code = f"""
import importlib, sys
for name in {names}:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name.split(".")[0] not in {sorted(EXTRAS)}:
            raise
print("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "False", done.stderr


def test_the_package_declares_what_it_imports_and_nothing_more():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    required = {Requirement(line).name for line in project["dependencies"]}
    optional = {Requirement(line).name for lines in project["optional-dependencies"].values() for line in lines}
    tops = {name.split(".")[0] for source in sources() for name in imported(source)}
    used = {DISTRIBUTIONS.get(name, name) for name in tops - sys.stdlib_module_names - {"distkv_dask"}}
    assert used <= required | optional
    assert required <= used


def test_only_two_files_depend_on_dasks_private_test_tools():
    users = {p.name for p in (ROOT / "tests").rglob("*.py") if "from distributed.utils_test import" in p.read_text()}
    assert users - {Path(__file__).name} == {"conftest.py", "_cluster.py"}
