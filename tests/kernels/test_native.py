"""What the C++ core promises beyond the contract: threads, concurrent callers, forks, and living without it."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from distkv_dask.kernels import advise_huge_pages, micro_attention, native_kernel

pytestmark = pytest.mark.skipif(native_kernel.missing() is not None, reason=str(native_kernel.missing()))


def long_decode(seed: int) -> dict[str, Any]:
    rng = torch.Generator().manual_seed(seed)
    storage = torch.randn(64, 2, 2, 64, 64, generator=rng)
    return {
        "q": torch.randn(2, 4, 64, generator=rng),
        "k_pool": storage[:, 0],
        "v_pool": storage[:, 1],
        "block_tables": torch.randperm(64, generator=rng).int().view(2, 32),
        "lengths": torch.tensor([2000, 1777], dtype=torch.int32),
        "scale": 0.125,
    }


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_splitting_over_threads_does_not_change_the_answer(threads: int) -> None:
    arguments = long_decode(0)
    out, lse = micro_attention(**arguments, threads=threads, implementation="native")
    expected = micro_attention(**arguments, implementation="reference")
    torch.testing.assert_close(out, expected[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(lse, expected[1], rtol=0, atol=2e-6)


def test_two_lanes_may_call_at_once() -> None:
    calls = [long_decode(seed) for seed in range(4)]
    expected = [micro_attention(**call, threads=1, implementation="native") for call in calls]

    def serve(seed: int) -> bool:
        threads = 1 + seed % 3
        results = [micro_attention(**calls[seed], threads=threads, implementation="native") for _ in range(50)]
        return all(torch.allclose(out, expected[seed][0], rtol=0, atol=1e-6) for out, _ in results)

    with ThreadPoolExecutor(4) as executor:
        assert all(executor.map(serve, range(4)))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_can_still_compute() -> None:
    script = """
import os, torch
from distkv_dask.kernels import micro_attention
pool = torch.randn(64, 2, 2, 64, 64)
def attend():
    return micro_attention(torch.ones(1, 4, 64), pool[:, 0], pool[:, 1], torch.arange(64, dtype=torch.int32)[None],
                           torch.tensor([4096], dtype=torch.int32), scale=0.1, threads=3)[0]
before = attend()
child = os.fork()
if child == 0:
    os._exit(0 if torch.allclose(attend(), before, atol=1e-6) else 1)
assert os.waitpid(child, 0)[1] == 0
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_without_the_core_torch_serves() -> None:
    script = """
import torch
from pathlib import Path
exists = Path.exists
Path.exists = lambda path, **options: not path.name.startswith("_core") and exists(path, **options)
from distkv_dask.kernels import IMPLEMENTATIONS, choose, merge
assert "native" not in IMPLEMENTATIONS
name, reason = choose("cpu", torch.bfloat16, 64, 64)
assert name == "torch" and "compiler" in reason
merge([(torch.ones(1, 1, 8), torch.ones(1, 1))] * 2)
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_huge_pages_are_asked_for_where_they_exist() -> None:
    assert advise_huge_pages(torch.empty(1 << 22)) == sys.platform.startswith("linux")
    assert not advise_huge_pages(torch.empty(4))
