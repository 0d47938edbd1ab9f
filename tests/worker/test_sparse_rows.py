"""Rows of a down projection that a ReLU made 0 are not read, and tokens are those of transformers."""

from __future__ import annotations

import math
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from distributed import Client, Scheduler, Worker

from distkv_dask import Engine, SamplingParams
from distkv_dask.worker.model import host_copy, sparse_rows
from distkv_dask.worker.model.host_copy import own_bytes
from distkv_dask.worker.model.load import load_model
from distkv_dask.worker.model.sparse_rows import down_projections, measured_limits, sparse_product
from tests._cluster import about_the_host, engine_test
from tests._models import model_dir, prompt_ids, reference_generate

pytestmark = about_the_host("rows are skipped on CPUs only")

SIZES = {"vocab_size": 499, "hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "bos_token_id": None}
SIZES |= {"eos_token_id": None, "pad_token_id": None, "tie_word_embeddings": False, "max_position_embeddings": 512}
KINDS: dict[str, transformers.PreTrainedConfig] = {
    "opt": transformers.OPTConfig(ffn_dim=256, word_embed_proj_dim=96, init_std=0.3, **SIZES),
    "llama": transformers.LlamaConfig(hidden_act="relu", intermediate_size=256, initializer_range=0.3, **SIZES),
    "nemotron": transformers.NemotronConfig(
        intermediate_size=256, num_key_value_heads=4, initializer_range=0.3, **SIZES
    ),  # squared
}


@cache
def saved(kind: str) -> Path:
    """A model with random weights, most of whose inner activations are 0."""
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(KINDS[kind], dtype=torch.float32)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "fc1.bias" in name:
                weight.fill_(-3.5)
        model.lm_head.weight *= 0.3
    folder = Path(tempfile.mkdtemp(prefix="distkv-relu-")) / kind
    model.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def always_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse_rows, "measured_limits", lambda linears: dict.fromkeys((1, 2, 4, 8), math.inf))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 3, 8])
@pytest.mark.parametrize("bias", [None, torch.randn(24, dtype=torch.float64)], ids=["plain", "bias"])
def test_the_product_is_that_of_all_rows(tokens: int, dtype: torch.dtype, bias: torch.Tensor | None) -> None:
    torch.manual_seed(tokens)
    weight = torch.randn(200, 24).to(dtype).t()
    inner = (torch.randn(tokens, 200) * (torch.rand(tokens, 200) < 0.1)).to(dtype)
    inner[-1] = 0  # all of its rows are left out
    exact = inner.double() @ weight.double().t() + (0 if bias is None else bias)
    done = sparse_product(inner, inner.nonzero(), weight, None if bias is None else bias.to(dtype))
    assert done.dtype == dtype
    torch.testing.assert_close(done.double(), exact, rtol=1e-5 if dtype == torch.float32 else 2e-2, atol=1e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_those_of_transformers(kind: str) -> None:
    prompts = [prompt_ids(length, seed=length) for length in (70, 30, 12)]
    expected = [one.tokens for one in reference_generate(saved(kind), prompts, 10)]

    @engine_test(workers=2)
    async def run(client: Client, scheduler: Scheduler, *workers: Worker) -> None:
        async with Engine(client, str(saved(kind)), dtype="float32", kv_memory="2 MiB", block_tokens=8) as engine:
            done = await engine.generate(prompts, SamplingParams(max_new_tokens=10, ignore_eos=True))
            assert [list(one.token_ids) for one in done] == expected
            status = await engine.status()
            assert all("rows of zeros are skipped" in one.weights for one in status.workers.values())

    run()


class EachItself:
    """Replaces attention."""

    def attend(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, sinks: Any = None
    ) -> torch.Tensor:
        return v.repeat_interleave(q.shape[1] // v.shape[1], 1)


def test_few_of_the_bytes_are_read_where_few_are_needed() -> None:
    model = load_model(str(saved("opt")), "float32", 1)
    counts = model.weights.rows
    assert counts is not None
    model.forward(torch.arange(1), torch.arange(1), EachItself())
    assert counts.dense == sum(one.weight.nbytes for one in down_projections(model._model))
    assert 0 < counts.read < 0.2 * counts.dense
    before = counts.dense
    model.forward(torch.arange(9), torch.arange(9), EachItself())  # many tokens together need most rows
    assert counts.dense == before


def test_rows_lie_together_in_the_file_that_processes_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(host_copy, "LEAST", 1)
    plain: Any = transformers.AutoModelForCausalLM.from_pretrained(saved("llama"))
    expected = [one.weight for one in down_projections(plain)]
    for _ in range(2):
        model = load_model(str(saved("llama")), "float32", 1)
        assert own_bytes(model._model) == 0
        for linear, weight in zip(down_projections(model._model), expected, strict=True):
            assert linear.weight.t().is_contiguous()
            assert torch.equal(linear.weight, weight)


def test_other_models_are_left_alone() -> None:
    assert load_model(str(model_dir("llama-gqa")), "float32", 1).weights.rows is None
    assert load_model(str(saved("llama")), "float32", 1, deterministic=True).weights.rows is None


def test_what_pays_is_measured() -> None:
    linears = [torch.nn.Linear(1024, 256, bias=False) for _ in range(2)]
    limits = measured_limits(linears)
    assert set(limits) == {1, 2, 4, 8}
    assert all(limit >= 0 for limit in limits.values())
