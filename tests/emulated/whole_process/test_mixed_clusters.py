"""Worker processes with and without a card in one cluster: they hold KV for each other, and tokens stay the same."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from distributed import Client, Nanny, Scheduler, SpecCluster
from transformers import AutoModelForCausalLM

from distkv_dask import Completion, Engine, SamplingParams
from tests._models import block_bytes, model_dir, prompt_ids, reference_generate
from tests._thorough import some_of

FAMILY, NEW = "llama-gqa", 24
MODEL = str(model_dir(FAMILY))
PROMPTS = [prompt_ids(250), prompt_ids(40, seed=1), prompt_ids(90, seed=2)]
SMALL: dict[str, Any] = {"block_tokens": 8, "prefill_chunk_tokens": 32, "device": "auto", "window_steps": 4}
CARD, CPU = "Emulated GPU", "cpu"
CLUSTERS = {
    "a card and memory of CPUs": [("card", 17), ("cpu memory", 9), ("cpu memory", 25)],
    "a CPU and memory of a card": [("cpu", 13), ("card memory", 35)],
    "homes of both kinds": [("card", 11), ("cpu", 29), ("card", 14)],
}
"""Workers, and blocks of KV memory of each: no worker has room for the first prompt and its answer, which take 35."""


@contextmanager
def cluster_of(workers: Sequence[tuple[str, int]]) -> Iterator[Client]:
    """A client of a cluster with these workers, each in its own process."""
    specs = {}
    for name, (kind, blocks) in enumerate(workers):
        resources = {"distkv-kv-memory": blocks * block_bytes(FAMILY)}
        if kind.endswith("memory"):
            resources["distkv-memory"] = 1
        env = {"CUDA_VISIBLE_DEVICES": "0" if kind.startswith("card") else ""}
        options = {"nthreads": 1, "resources": resources, "env": env, "dashboard": False}
        specs[name] = {"cls": Nanny, "options": options}
    scheduler = {"cls": Scheduler, "options": {"host": "127.0.0.1", "dashboard": False}}
    with SpecCluster(specs, scheduler) as cluster, Client(cluster) as client:
        client.wait_for_workers(len(workers), timeout=60)
        yield client


@pytest.mark.parametrize("kind", some_of(CLUSTERS, *(one for one in CLUSTERS if "memory" not in one)))
def test_a_prompt_over_cards_and_cpus_gets_the_tokens_of_one_process(kind: str) -> None:
    workers = CLUSTERS[kind]
    expected = [one.tokens for one in reference_generate(model_dir(FAMILY), PROMPTS, NEW)]
    with cluster_of(workers) as client, Engine(client, MODEL, dtype="float32", **SMALL) as engine:
        status = engine.status().workers
        assert sorted((one.role, one.device, one.capacity_blocks) for one in status.values()) == sorted(
            ("memory" if "memory" in kind else "instance", CARD if "card" in kind else CPU, blocks)
            for kind, blocks in workers
        )
        done = engine.generate(PROMPTS, SamplingParams(max_new_tokens=NEW, ignore_eos=True))
        assert [list(one.token_ids) for one in done] == expected
        assert {status[span.worker].device for span in done[0].placement} == {CARD, CPU}


@pytest.mark.thorough
def test_cpus_serve_halves_of_a_card() -> None:
    """Single precision must find each token about as likely as its own, because no reference rounds as a split does."""
    done: list[Completion] = []
    with cluster_of(CLUSTERS["a card and memory of CPUs"]) as client:
        for dtype in ("bfloat16", "float16"):
            with Engine(client, MODEL, dtype=dtype, **SMALL) as engine:
                done += engine.generate(PROMPTS, SamplingParams(max_new_tokens=NEW, ignore_eos=True))
    assert all(len({span.worker for span in one.placement}) > 1 for one in (done[0], done[3]))
    plain = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    for prompt, one in zip(PROMPTS * 2, done, strict=True):
        tokens = list(one.token_ids)
        with torch.inference_mode():
            logits = plain(torch.tensor([[*prompt, *tokens[:-1]]])).logits[0, len(prompt) - 1 :]
        missed = logits.max(-1).values - logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        assert missed.max() < 0.4 * logits.std(), "a wrong one misses by two to four"


@pytest.mark.parametrize("leaves", [CARD, pytest.param(CPU, marks=pytest.mark.thorough)])
def test_blocks_move_between_cards_and_cpus_while_their_request_decodes(leaves: str) -> None:
    prompt, new = prompt_ids(200), 120
    expected = reference_generate(model_dir(FAMILY), [prompt], new)[0].tokens
    with (
        cluster_of([("card", 31), ("cpu", 32), ("card", 22)]) as client,  # the third one replaces the one that leaves
        Engine(client, MODEL, dtype="float32", **SMALL) as engine,
    ):
        running = engine.submit(prompt, SamplingParams(max_new_tokens=new, ignore_eos=True))
        deadline = time.monotonic() + 60
        while not any(one.generated_tokens > 1 for one in engine.status().sequences.values()):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        (sequence,) = engine.status().sequences.values()
        devices = {worker: one.device for worker, one in engine.status().workers.items()}
        leaving = next((span.worker for span in sequence.placement if devices[span.worker] == leaves), None)
        if leaving is None:
            pytest.fail(f"nothing is on {leaves}: {sequence.placement}")
        assert leaving in client.retire_workers([leaving])
        assert list(running.result(120).token_ids) == expected
        assert engine.status().totals["moved_blocks"] > 0
