"""A model that is much larger than the memory of any worker opens in stages, and no nanny restarts a worker for it."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
import transformers
from distributed import LocalCluster, Nanny, Scheduler, Worker

from distkv_dask import Engine, SamplingParams
from tests._cluster import PROTOCOL, client_of_all
from tests._models import model_dir, prompt_ids, reference_generate, save_model

STAGES = 4
TIMES = 2.5
"""Size of the model as a multiple of a worker's memory for it."""


def large_model(room: int) -> Path:
    """A Llama in float32 with :data:`TIMES` times ``room`` bytes."""
    sizes = {"vocab_size": 499, "hidden_size": 1024, "intermediate_size": 2048, "head_dim": 64}
    layer = 4 * (2 * 1024 * 1024 + 2 * 1024 * 256 + 3 * 1024 * 2048)
    none = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
    config = transformers.LlamaConfig(
        num_hidden_layers=int(-(-TIMES * room // layer)),
        num_attention_heads=16,
        num_key_value_heads=4,
        initializer_range=0.1,
        **(sizes | none),
    )
    return save_model(config, "large")


def resident(dask_worker: Worker) -> int:
    """Memory of a worker's process in bytes."""
    return int(psutil.Process().memory_info().rss)


def limit_worker(limit: int, dask_worker: Worker) -> None:
    dask_worker.memory_manager.memory_limit = limit


def limit_nanny(limit: int, dask_worker: Nanny) -> None:
    dask_worker.memory_manager.memory_limit = limit


def tell_scheduler(limit: int, dask_scheduler: Scheduler) -> None:
    """Workers tell their limit when they register."""
    for worker in dask_scheduler.workers.values():
        worker.memory_limit = limit


@pytest.mark.slow
@pytest.mark.thorough
@pytest.mark.timeout(600)
def test_a_model_larger_than_any_worker_answers_in_stages_and_none_is_restarted() -> None:
    prompts = [prompt_ids(length, seed=length) for length in (70, 9)]
    greedy = SamplingParams(max_new_tokens=8, ignore_eos=True)
    given = {"dtype": "float32", "kv_memory": "16 MiB", "block_tokens": 8}
    with (
        LocalCluster(
            n_workers=STAGES, threads_per_worker=1, protocol=PROTOCOL, dashboard_address=None, memory_limit="8 GiB"
        ) as cluster,
        client_of_all(cluster) as client,
    ):
        with Engine(client, str(model_dir("qwen3-moe")), stages=STAGES, **given):
            pass  # imports the modules that take memory in any engine
        base = max(client.run(resident).values())
        room = 2 * base
        client.run(limit_worker, base + room)
        client.run(limit_nanny, base + room, nanny=True)
        client.run_on_scheduler(tell_scheduler, base + room)
        path = large_model(room)
        expected = [one.tokens for one in reference_generate(path, prompts, 8)]
        before = client.run(lambda: psutil.Process().pid)
        with Engine(client, str(path), stages="auto", **given) as engine:
            (home,) = engine.status().workers.values()
            assert home.weights.count(" on tcp") == STAGES - 1
            assert [list(one.token_ids) for one in engine.generate(prompts, greedy)] == expected
        assert client.run(lambda: psutil.Process().pid) == before
