"""The card is installed in a process and removed, and torch is as before; workers get it through their preload."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import dask
import pytest
import torch
from distributed import Client, LocalCluster

import emulated

PRELOAD = "emulated.preload"


def test_uninstalling_restores_torch() -> None:
    script = """
import os, torch, emulated
from torch.utils import _device
_device._device_constructors()
owners = torch, torch.cuda, torch.Tensor
before = [dict(vars(owner)) for owner in owners], dict(os.environ)
for _ in range(2):
    emulated.install()
    emulated.install()
    assert torch.cuda.is_available()
    assert torch.ones(2, pin_memory=True).cuda().sum().item() == 2
    with torch.device("meta"):
        assert torch.zeros(2).is_meta
    emulated.uninstall()
    after = [dict(vars(owner)) for owner in owners], dict(os.environ)
    assert [set(b) ^ set(a) for b, a in zip(before[0], after[0])] == [set()] * 3
    assert all(a[name] is b[name] for b, a in zip(before[0], after[0]) for name in b if name != "__annotations__")
    assert before[1] == after[1]
    assert not torch.cuda.is_available()
    try:
        torch.ones(2, device="cuda")
    except (AssertionError, NotImplementedError) as error:
        print(type(error).__name__)
"""
    path = str(Path(__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()


@pytest.mark.slow
def test_workers_have_the_card_by_their_preload() -> None:
    def seen() -> tuple[str, str, bool]:
        return torch.cuda.get_device_name(), os.environ["TRITON_INTERPRET"], torch.ones(2, device="cuda").is_cuda

    settings = {"distributed.worker.preload": [PRELOAD]}
    with (
        dask.config.set(settings),
        LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=None) as cluster,
        Client(cluster) as client,
    ):
        assert client.submit(seen).result() == ("Emulated GPU", "1", True)


def test_the_card_is_as_large_as_it_is_told_to_be() -> None:
    script = """
import torch, emulated
emulated.install(memory=1 << 20, processors=8, capability=(8, 0))
assert torch.cuda.mem_get_info()[0] == 1 << 20
assert torch.cuda.get_device_properties(0).multi_processor_count == 8
assert torch.cuda.get_device_capability() == (8, 0)
"""
    path = str(Path(__file__).parents[1])
    subprocess.run([sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": path}, check=True)


def test_without_a_compiler_there_is_no_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "compiler" in emulated.missing()
