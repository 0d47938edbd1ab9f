"""Guarantees of the C++ core and numba beyond the contract: threads, concurrent callers, forks, work without them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from distkv_dask.kernels import IMPLEMENTATIONS, advise_huge_pages, make_ready, micro_attention, native_kernel

FAST = [
    pytest.param("native", marks=pytest.mark.skipif(native_kernel.missing() is not None, reason="no C++ core here")),
    pytest.param("numba", marks=pytest.mark.skipif("numba" not in IMPLEMENTATIONS, reason="numba is not installed")),
]
fast = pytest.mark.parametrize("implementation", FAST)
SETS = [name for name in IMPLEMENTATIONS if name.startswith("native:") and "model" not in name]  # these: test_amx.py
WITHOUT_CORE = """
import torch
from pathlib import Path
exists = Path.exists
Path.exists = lambda path, **options: not path.name.startswith("_core") and exists(path, **options)
"""


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


def run(script: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", script], env=os.environ | environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@fast
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_splitting_over_threads_does_not_change_the_answer(implementation: str, threads: int) -> None:
    arguments = long_decode(0)
    out, lse = micro_attention(**arguments, threads=threads, implementation=implementation)
    expected = micro_attention(**arguments, implementation="reference")
    torch.testing.assert_close(out, expected[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(lse, expected[1], rtol=0, atol=2e-6)


def ragged(rows: Sequence[tuple[int, int]], form: str, dtype: torch.dtype) -> dict[str, Any]:
    """A batch of rows of (tokens, queries); a row does not depend on the others."""
    causal = form != "full"
    windows = [at for tokens, n in rows for at in range(tokens - n - 1500, tokens - 1500)]
    blocks = [-(-tokens // 16) for tokens, _ in rows]
    parts = [torch.Generator().manual_seed(tokens) for tokens, _ in rows]
    storage = torch.cat(
        [torch.randn(n, 2, 2, 16, 64, generator=part) for n, part in zip(blocks, parts, strict=True)]
    ).to(dtype)
    tables = torch.zeros(len(rows), max(blocks), dtype=torch.int32)
    for row, ids in enumerate(torch.arange(sum(blocks), dtype=torch.int32).split(blocks)):
        tables[row, : len(ids)] = ids
    queries = torch.tensor([0, *(queries for _, queries in rows)])
    return {
        "q": torch.cat([torch.randn(n, 6, 64, generator=part) for (_, n), part in zip(rows, parts, strict=True)]).to(
            dtype
        ),
        "k_pool": storage[:, 0],
        "v_pool": storage[:, 1],
        "block_tables": tables,
        "lengths": torch.tensor([tokens for tokens, _ in rows], dtype=torch.int32),
        "scale": 0.125,
        "query_offsets": queries.cumsum(0).int(),
        "causal": causal,
        "q_start": torch.tensor([tokens - n for tokens, n in rows], dtype=torch.int32) if causal else None,
        "first_keys": torch.tensor(windows, dtype=torch.int32) if form == "window" else None,
        "soft_cap": 20.0 if form == "window" else None,
    }


ROWS = [(5000, 1), (70, 1), (2100, 3), (3000, 16), (4100, 100), (9000, 1), (1500, 400)]


@pytest.mark.parametrize("implementation", [*FAST, *SETS, "torch"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("form", ["full", "causal", "window"])
def test_neither_threads_nor_other_rows_change_a_bit_of_a_row(
    implementation: str, dtype: torch.dtype, form: str
) -> None:
    alone = [micro_attention(**ragged([row], form, dtype), threads=1, implementation=implementation) for row in ROWS]
    for threads, order in ((1, 1), (2, 1), (3, -1), (8, 1)):
        rows, right = ROWS[::order], alone[::order]
        out, lse = micro_attention(**ragged(rows, form, dtype), threads=threads, implementation=implementation)
        assert torch.equal(out, torch.cat([one for one, _ in right]))
        assert torch.equal(lse, torch.cat([one for _, one in right]))


@pytest.mark.parametrize("implementation", [*FAST, *SETS, "torch"])
@pytest.mark.parametrize("form", ["full", "causal"])
def test_first_keys_that_hide_nothing_change_no_bit(implementation: str, form: str) -> None:
    arguments = ragged(ROWS, form, torch.bfloat16)
    expected = micro_attention(**arguments, implementation=implementation)
    for first in (0, -5, -(2**31)):
        arguments["first_keys"] = torch.full((len(arguments["q"]),), first, dtype=torch.int32)
        found = micro_attention(**arguments, implementation=implementation)
        assert all(map(torch.equal, found, expected))


@fast
def test_two_lanes_may_call_at_once(implementation: str) -> None:
    calls = [long_decode(seed) for seed in range(4)]
    expected = [micro_attention(**call, threads=1, implementation=implementation) for call in calls]

    def serve(seed: int) -> bool:
        threads = 1 + seed % 3
        results = [micro_attention(**calls[seed], threads=threads, implementation=implementation) for _ in range(50)]
        return all(torch.allclose(out, expected[seed][0], rtol=0, atol=1e-6) for out, _ in results)

    with ThreadPoolExecutor(4) as executor:
        assert all(executor.map(serve, range(4)))


@fast
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_can_still_compute(implementation: str) -> None:
    run(f"""
import os, torch
from distkv_dask.kernels import micro_attention
pool = torch.randn(64, 2, 2, 64, 64)
def attend():
    return micro_attention(torch.ones(1, 4, 64), pool[:, 0], pool[:, 1], torch.arange(64, dtype=torch.int32)[None],
                           torch.tensor([4096], dtype=torch.int32), scale=0.1, threads=3,
                           implementation={implementation!r})[0]
before = attend()
child = os.fork()
if child == 0:
    os._exit(0 if torch.allclose(attend(), before, atol=1e-6) else 1)
assert os.waitpid(child, 0)[1] == 0
""")


@pytest.mark.thorough
@pytest.mark.skipif("numba" not in IMPLEMENTATIONS, reason="numba is not installed")
def test_without_the_core_numba_serves_and_compiles_before_the_first_request(tmp_path: Path) -> None:
    script = f"""{WITHOUT_CORE}
from distkv_dask.kernels import IMPLEMENTATIONS, choose, make_ready, micro_attention, numba_kernel
assert "native" not in IMPLEMENTATIONS
pool = torch.ones(2, 1, 4, 8, dtype=torch.bfloat16)
name, reason = make_ready(pool, pool, 2)
assert name == "numba" and "compiler" in reason
codes = numba_kernel.compiled(pool.dtype)
print(sum(sum(code.stats.cache_hits.values()) for code in codes))
before = [len(code.signatures) for code in codes]
table, length = torch.zeros(1, 1, dtype=torch.int32), torch.tensor([3], dtype=torch.int32)
out, lse = micro_attention(torch.ones(1, 2, 8, dtype=torch.bfloat16), pool, pool, table, length, scale=0.5)
assert torch.equal(out, torch.ones(1, 2, 8))
assert [len(code.signatures) for code in codes] == before == [1, 1, 1]
"""
    first, second = (run(script, NUMBA_CACHE_DIR=str(tmp_path)) for _ in range(2))
    assert (int(first), int(second)) == (0, 3), "a second worker compiled what lies in the cache"


def test_without_the_core_and_numba_torch_serves() -> None:
    run(f"""{WITHOUT_CORE}
import sys
sys.modules["numba"] = None
from distkv_dask.kernels import IMPLEMENTATIONS, choose, merge
assert not {{"native", "numba"}} & set(IMPLEMENTATIONS)
name, reason = choose("cpu", torch.bfloat16, 64, 64)
assert name == "torch" and "compiler" in reason and "distkv-dask[numba]" in reason
merge([(torch.ones(1, 1, 8), torch.ones(1, 1))] * 2)
""")


@pytest.mark.skipif("numba" not in IMPLEMENTATIONS, reason="numba is not installed")
def test_a_numba_that_does_not_load_is_told_as_the_reason() -> None:
    run(f"""{WITHOUT_CORE}
import sys, types
broken = types.ModuleType("numba")
broken.__spec__ = __import__("importlib.util").util.find_spec("numba")
sys.modules["numba"] = broken
from distkv_dask.kernels import choose
name, reason = choose("cpu", torch.bfloat16, 64, 64)
assert name == "torch" and "numba does not load" in reason, reason
""")


@pytest.mark.skipif(native_kernel.missing() is not None, reason="no C++ core here")
def test_the_core_serves_wherever_it_was_built() -> None:
    assert make_ready(*torch.zeros(2, 1, 1, 16, 8), 1).name == "native"


def test_huge_pages_are_asked_for_where_they_exist() -> None:
    assert advise_huge_pages(torch.empty(1 << 22)) == sys.platform.startswith("linux")
    assert not advise_huge_pages(torch.empty(4))
