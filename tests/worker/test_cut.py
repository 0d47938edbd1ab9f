"""A model cut into stages in one process gives the results of transformers; models that cannot be cut are refused."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from distkv_dask.errors import UnsupportedModelError
from distkv_dask.placement import Stage
from distkv_dask.worker.model.load import load_model
from distkv_dask.worker.model.mapped import few_pages
from tests._models import WINDOWED, model_dir, prompt_ids


class OwnSequence:
    """Causal attention over the tokens of one forward; with ``further`` stages of the same process."""

    def __init__(self, heads: int) -> None:
        self.heads = heads
        self.further: Chain | None = None

    def attend(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, sinks: object = None
    ) -> torch.Tensor:
        groups = self.heads // k.shape[1]
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        scores = torch.einsum("thd,shd->hts", q, k) * scale
        hidden = torch.ones(scores.shape[1:]).triu(1).bool()
        return torch.einsum("hts,shd->thd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)


class Chain:
    """Further stages."""

    def __init__(self, stages: list, positions: torch.Tensor, heads: int) -> None:
        self.stages, self.positions, self.heads = stages, positions, heads

    def through(self, hidden: torch.Tensor) -> torch.Tensor:
        for stage in self.stages:
            with ThreadPoolExecutor(1) as worker:  # like another worker, with its own attention
                step = OwnSequence(self.heads)
                hidden = worker.submit(stage.further, hidden[0], self.positions, step).result()[None]
        return hidden


@pytest.mark.parametrize(("family", "count"), [("llama-gqa", 3), ("qwen2", 2), ("qwen3-moe", 4), ("phi3", 2)])
def test_stages_together_compute_the_logits_of_transformers(family: str, count: int) -> None:
    path = str(model_dir(family))
    home, *others = [load_model(path, "float32", 1, stage=Stage(number, count)) for number in range(count)]
    ids, heads = torch.tensor(prompt_ids(20, seed=5)), home.geometry.heads
    positions, step = torch.arange(len(ids)), OwnSequence(heads)
    step.further = Chain(others, positions, heads)
    found = home.forward(ids, positions, step)
    with torch.inference_mode():
        plain = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        expected = plain(ids[None]).logits[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert home.geometry.layers + sum(one.geometry.layers for one in others) == home.whole.layers
    parts = [one.weight_bytes for one in (home, *others)]
    assert sum(parts) < 1.01 * sum(one.nbytes for one in plain.parameters())  # all have the last norm


@pytest.mark.parametrize("family", [*WINDOWED, "qwen3-next"])
def test_layers_whose_state_is_at_the_home_are_not_cut(family: str) -> None:
    with pytest.raises(UnsupportedModelError, match=r"set distkv\.stages to 1"):
        load_model(str(model_dir(family)), "float32", 1, stage=Stage(0, 2))


def test_more_stages_than_layers_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="each stage needs one"):
        load_model(str(model_dir("llama-gqa")), "float32", 1, stage=Stage(0, 4))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says which pages a process has of a file")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_more_than_a_layer_and_the_head_are_there_while_a_stage_opens(dtype: torch.dtype, tmp_path: Path) -> None:
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(num_hidden_layers=8, vocab_size=4096, tie_word_embeddings=False, **sizes)
    transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(tmp_path)
    file, most = tmp_path / "model.safetensors", 0

    def look(*_: object) -> None:
        nonlocal most
        most = max(most, resident(file))

    with torch.nn.modules.module.register_module_forward_hook(look):
        found = load_model(str(tmp_path), "auto", 1, stage=Stage(1, 4))
    head, layer = 4096 * 512, 2 * 512 * 512 + 2 * 512 * 128 + 3 * 512 * 2048
    assert head < 1024 * most / dtype.itemsize < 1.1 * (head + layer)
    assert resident(file) < most / 8
    assert found.weight_bytes < file.stat().st_size / 4


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says which pages a process has of a file")
def test_pages_that_were_given_back_are_read_again_when_needed(tmp_path: Path) -> None:
    file, some = tmp_path / "weights.safetensors", torch.arange(1 << 18, dtype=torch.float32).view(512, 512)
    save_file({"weight": some}, file)
    module = torch.nn.Linear(512, 512, bias=False)
    module.weight = torch.nn.Parameter(load_file(file)["weight"])
    with torch.no_grad(), few_pages(module) as drop_pages:
        expected = module(some)
        assert resident(file) < 256
        torch.testing.assert_close(module.weight, some)
        assert resident(file) > 512
        drop_pages([module.weight])
        assert resident(file) < 256
        torch.testing.assert_close(module(some), expected)


def resident(file: Path) -> int:
    """KiB of a file that are mapped and present in this process."""
    maps = Path("/proc/self/smaps").read_text().split(str(file))[1:]
    return sum(int(one.split("Rss:")[1].split()[0]) for one in maps)
