"""How fast are decode and prefill with every sequence's KV split over two workers, compared with all KV at its home?

A model of SmolLM2-135M's shape with fewer layers and random weights, in bfloat16, on two workers of one thread; 8
sequences of 2,048 tokens, 16K in all. In both modes each worker is the home of four sequences, so both do the same
arithmetic; in split mode each worker also holds half of the KV of the other's four. One engine serves both modes in
turns (local, split, split, local, ...); figures are medians, and the ratio is of tokens per second.
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from _placement import place_by
from _report import parser, report
from distributed import Client, LocalCluster

from distkv_dask import Engine, EngineStatus, SamplingParams

RESULT_SECONDS = 300.0
VOCABULARY, BLOCK = 49_152, 64
QUESTION = [1, 2, 3]


def save_model(layers: int, folder: Path) -> None:
    """SmolLM2-135M, except for its number of layers and its weights."""
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)


def prefill_rate(engine: Engine, prompts: Sequence[list[int]]) -> float:
    """Prompt tokens per second, with one new token each."""
    began = time.perf_counter()
    engine.generate(prompts, SamplingParams(max_new_tokens=1, ignore_eos=True))
    return sum(map(len, prompts)) / (time.perf_counter() - began)


def decode_rate(engine: Engine, prompts: Sequence[list[int]], new: int) -> tuple[float, float]:
    """New tokens per second while all sequences decode, and the share of the windows' time spent waiting.

    The prompts are ingested first, so that all sequences start to decode at the same time.
    """
    documents = [engine.ingest(prompt) for prompt in prompts]
    before = engine.status().totals
    began = time.perf_counter()
    running = [one.submit(QUESTION, SamplingParams(max_new_tokens=new, ignore_eos=True)) for one in documents]
    done = [one.result(RESULT_SECONDS) for one in running]
    seconds = time.perf_counter() - began
    after = engine.status().totals
    for document in documents:
        document.release()
    assert all(len(one.token_ids) == new for one in done), done
    waiting, decoding = (after[name] - before.get(name, 0.0) for name in ("waiting_seconds", "decode_seconds"))
    return len(prompts) * new / seconds, waiting / decoding


def measure(options: argparse.Namespace, folder: str) -> tuple[dict[bool, dict[str, list[float]]], str]:
    """Rates of every turn with and without split KV, and the kind of channel."""
    way, homes = {"split": False}, itertools.cycle((0, 1))

    def choose(tokens: int) -> list[tuple[int, int | None]]:
        home = next(homes)
        half = min(tokens, options.tokens) // 2 // BLOCK * BLOCK
        return [(1 - home, half), (home, None)] if way["split"] else [(home, None)]

    place_by(choose)
    draw = random.Random(0)
    prompts = [[draw.randrange(VOCABULARY) for _ in range(options.tokens)] for _ in range(options.batch)]
    found: dict[bool, dict[str, list[float]]] = {
        split: {"prefill": [], "decode": [], "waiting": []} for split in (False, True)
    }
    settings: dict[str, Any] = {
        "dtype": "bfloat16",
        "kv_memory": "160 MiB",
        "block_tokens": BLOCK,
        "prefix_cache": False,
    }
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
        Client(cluster) as client,
        Engine(client, folder, channel=options.channel, **settings) as engine,
    ):
        for way["split"] in (False, True):
            engine.generate([prompt[:256] for prompt in prompts[:2]], SamplingParams(max_new_tokens=4))  # warm-up
        for number in range(options.repeat):
            for split in (False, True) if number % 2 == 0 else (True, False):
                way["split"] = split
                found[split]["prefill"].append(prefill_rate(engine, prompts))
                rate, waiting = decode_rate(engine, prompts, options.new)
                found[split]["decode"].append(rate)
                found[split]["waiting"].append(waiting)
        status: EngineStatus = engine.status()
    return found, next(iter(status.workers.values())).channels


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--layers", type=int, default=8, help="layers of the model")
    arguments.add_argument("--tokens", type=int, default=2048, help="tokens of a sequence")
    arguments.add_argument("--batch", type=int, default=8, help="sequences")
    arguments.add_argument("--new", type=int, default=192, help="new tokens of each sequence when decoding is measured")
    arguments.add_argument("--repeat", type=int, default=4, help="turns")
    arguments.add_argument("--channel", choices=["auto", "tcp", "unix", "ucx"], default="auto", help="kind of channel")
    options = arguments.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        save_model(options.layers, Path(folder))
        found, channel = measure(options, folder)
    medians = {split: {name: statistics.median(values) for name, values in of.items()} for split, of in found.items()}
    local, remote = medians[False], medians[True]
    report(
        {
            "channel": channel,
            "local_prefill_tokens_per_second": local["prefill"],
            "split_prefill_tokens_per_second": remote["prefill"],
            "prefill_ratio": remote["prefill"] / local["prefill"],
            "local_decode_tokens_per_second": local["decode"],
            "split_decode_tokens_per_second": remote["decode"],
            "decode_ratio": remote["decode"] / local["decode"],
            "split_waiting_share": remote["waiting"],
            "turns": {"split" if split else "local": of for split, of in found.items()},
        },
        {name: getattr(options, name) for name in ("layers", "tokens", "batch", "new", "repeat")},
        options.json,
    )


if __name__ == "__main__":
    main()
