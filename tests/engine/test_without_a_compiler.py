"""An engine on machines without the C++ core: the same tokens, and no request waits for a compiler."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from distributed import Client, Scheduler, Worker

from distkv_dask import Engine, SamplingParams
from distkv_dask.kernels import IMPLEMENTATIONS, dispatch, native_kernel, numba_kernel
from distkv_dask.worker.native import wire as native_wire
from tests._cluster import about_the_host, engine_test
from tests._models import model_dir, prompt_ids, reference_generate

NEW = 12
SMALL = {"dtype": "float32", "kv_memory": "1 MiB", "block_tokens": 8, "prefill_chunk_tokens": 32}


@pytest.fixture(params=["numba", "torch"])
def served(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Name of the implementation that engines use without the core."""
    if request.param not in IMPLEMENTATIONS:
        pytest.skip(f"{request.param} is not available here")
    monkeypatch.setattr(native_kernel, "missing", lambda: "no compiler")
    if request.param == "torch":
        monkeypatch.setattr(numba_kernel, "missing", lambda: "no numba")
    for cached in (dispatch.choose, native_wire.wire, numba_kernel.compiled):
        cached.cache_clear()
    yield request.param
    for cached in (dispatch.choose, native_wire.wire):
        cached.cache_clear()


@about_the_host("cards have kernels of their own, which need no compiler of C++")
def test_tokens_are_those_of_one_process_and_kernels_are_compiled_at_opening(served: str) -> None:
    prompts = [prompt_ids(length, seed=length) for length in (150, 5)]
    expected = reference_generate(model_dir("llama-gqa"), prompts, NEW)

    @engine_test(workers=2)
    async def run(client: Client, scheduler: Scheduler, *workers: Worker) -> None:
        async with Engine(client, str(model_dir("llama-gqa")), **SMALL) as engine:
            compiled = numba_kernel.compiled.cache_info().currsize
            assert compiled == (served == "numba")
            done = await engine.generate(prompts, SamplingParams(max_new_tokens=NEW, ignore_eos=True))
            told = (await engine.status()).workers.values()
            assert all(one.kernels.startswith(served) for one in told)
            assert [list(one.token_ids) for one in done] == [one.tokens for one in expected]
            assert numba_kernel.compiled.cache_info().currsize == compiled

    run()
