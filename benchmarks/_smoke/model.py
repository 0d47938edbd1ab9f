"""A model of Qwen3-8B's sizes without attention, eager and as a CUDA graph; and a whole engine on one card."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM

from _smoke.kernels import Card

AttentionInterface.register("smoke", lambda module, q, k, v, mask, **_: (q.transpose(1, 2).contiguous(), None))


def steps(card: Card, figures: dict[str, Any]) -> None:
    """Milliseconds of a decode step without attention: what launches cost, and what a graph saves."""
    sizes = {"vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36}
    if card.small:
        sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = AutoConfig.for_model("qwen3", **sizes, num_attention_heads=32, num_key_value_heads=8, head_dim=128)
    config.dtype = torch.bfloat16
    model = AutoModelForCausalLM.from_config(config, attn_implementation="smoke", dtype=torch.bfloat16)
    model = model.eval().to("cuda")
    for rows in (1, 8, 64)[: 1 if card.small else 3]:
        ids = torch.ones(1, rows, dtype=torch.int64, device="cuda")
        at = torch.arange(rows, device="cuda")[None]

        def step(ids: torch.Tensor = ids, at: torch.Tensor = at) -> None:
            model(input_ids=ids, position_ids=at, use_cache=False)

        with torch.inference_mode():
            figures[f"eager_{rows}_ms"] = round(card.timed(step, 10) * 1e3, 2)
            if not card.small:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    step()
                figures[f"graph_{rows}_ms"] = round(card.timed(graph.replay, 10) * 1e3, 2)


def engine(card: Card, figures: dict[str, Any]) -> bool:
    """A random Llama-like model in an engine of two workers on one card: tokens of transformers, local and split."""
    sizes = {"vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "max_position_embeddings": 8192}
    if card.small:
        sizes = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
        heads |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **sizes, **heads))
    prompt = torch.randint(5, sizes["vocab_size"], (60 if card.small else 2000,)).tolist()
    new = 8 if card.small else 32
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        with torch.inference_mode():
            there = model.to("cuda").generate(
                torch.tensor([prompt], device="cuda"), max_new_tokens=new, do_sample=False, eos_token_id=None
            )
        right = there[0, len(prompt) :].tolist()
        del model, there
        torch.cuda.empty_cache()
        token_bytes = sizes["num_hidden_layers"] * 2 * heads["num_key_value_heads"] * heads["head_dim"] * 4
        for name, tokens in (("local", 2 * len(prompt)), ("split", (len(prompt) + new) * 6 // 10 + 16)):
            found, seconds = _answered(folder, prompt, new, tokens * token_bytes)
            figures |= {f"{name}_tokens": found == right, f"{name}_decode_ms": round(seconds * 1e3, 2)}
    return bool(figures["local_tokens"] and figures["split_tokens"])


def _answered(folder: str, prompt: list[int], new: int, kv_memory: int) -> tuple[list[int], float]:
    """Tokens of a request in float32, and seconds of a decode step, with ``kv_memory`` bytes at each worker."""
    from distributed import Client, LocalCluster

    from distkv_dask import Engine, SamplingParams

    settings = {"dtype": "float32", "kv_memory": kv_memory, "block_tokens": 16, "device": "cuda", "prefix_cache": False}
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, processes=False, dashboard_address=":0") as cluster,
        Client(cluster) as client,
        Engine(client, str(Path(folder)), performance="preset", **settings) as opened,
    ):
        seconds = []
        for count in (1, 1, new):
            began = time.perf_counter()
            asked = opened.submit(prompt, SamplingParams(max_new_tokens=count, ignore_eos=True))
            tokens = list(asked.result().token_ids)
            seconds.append(time.perf_counter() - began)
        return tokens, (seconds[2] - seconds[1]) / (new - 1)
