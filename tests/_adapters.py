"""Tiny adapters as saved by peft, and tokens that transformers with peft generates with them."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from _models import Reference, generated, model_dir

peft = pytest.importorskip("peft")

_saved = tempfile.TemporaryDirectory(prefix="distkv-adapters-")

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
ALL = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]


def _plain(model: Path | str) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(str(model), dtype=torch.float32).eval()


@cache
def adapter_dir(family: str, seed: int = 0, targets: str = "all", **settings: Any) -> Path:
    """Return a tiny adapter of a tiny model, with large random weights, so that answers differ from the model's own."""
    name = "-".join([family, str(seed), targets, *(f"{key}{value}" for key, value in settings.items())])
    return save_adapter(model_dir(family), Path(_saved.name) / name, seed, targets, **settings)


def save_adapter(model: Path | str, target: Path, seed: int = 0, targets: str = "all", **settings: Any) -> Path:
    """Save an adapter with random weights, the same ones each time."""
    named = {"all": ALL, "attention": ATTENTION, "all-linear": "all-linear"}.get(targets, [targets])
    common = {"r": 4, "lora_alpha": 8, "target_modules": named, "task_type": "CAUSAL_LM"}
    adapted = peft.get_peft_model(_plain(model), peft.LoraConfig(**(common | settings)))
    generator = torch.Generator().manual_seed(seed)
    for key, weight in adapted.named_parameters():
        if "lora_" in key:
            weight.data.normal_(0, 0.3, generator=generator)
    adapted.save_pretrained(str(target))
    return target


def adapted_generate(
    model: Path | str, adapter: Path, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> list[Reference]:
    """Generate greedily with transformers and peft in float32, without merging the adapter, one prompt at a time."""
    return [_reference(str(model), str(adapter), tuple(prompt), max_new_tokens) for prompt in prompts]


@cache
def _reference(model: str, adapter: str, prompt: tuple[int, ...], max_new_tokens: int) -> Reference:
    return generated(_adapted(model, adapter), prompt, max_new_tokens)


@lru_cache(maxsize=4)
def _adapted(model: str, adapter: str) -> Any:
    return peft.PeftModel.from_pretrained(_plain(model), adapter).eval()
