"""Models of transformers run on the emulated card, with the same results as on the host."""

from __future__ import annotations

import emulated
import pytest
import torch
import transformers
from _models import model_dir, prompt_ids, reference_generate

FAMILIES = [
    "llama-gqa",
    "llama-mha",
    "qwen2",
    "qwen3",
    "phi3",
    "qwen3-moe",
    "mixtral",
    "gemma2",
    "gpt-oss",
    "deepseek-v3",
]


def load(family: str, **settings: object) -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(model_dir(family), **settings).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_and_logits_are_those_of_the_host(family: str) -> None:
    (expected,) = reference_generate(model_dir(family), [prompt_ids(20)], 6)
    model = load(family, dtype=torch.float32).to("cuda")
    assert {one.device.type for one in (*model.parameters(), *model.buffers())} == {"cuda"}
    ids = torch.tensor([prompt_ids(20) + expected.tokens]).cuda()
    with torch.inference_mode():
        logits = model(ids).logits[0, 19:-1].cpu()
    torch.testing.assert_close(logits, expected.logits, rtol=0, atol=1e-3)
    assert logits.argmax(-1).tolist() == expected.tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weights_are_read_to_the_card(dtype: torch.dtype) -> None:
    pytest.importorskip("accelerate")  # transformers needs it for device_map
    before = torch.cuda.memory_allocated()
    model = load("qwen3", dtype=dtype, device_map={"": "cuda:0"})
    weights = {one.data.untyped_storage().data_ptr(): one.nbytes for one in model.parameters()}
    assert all(one.is_cuda and one.dtype == dtype for one in model.parameters())
    assert 0 <= torch.cuda.memory_allocated() - before - sum(weights.values()) < 512 * (len(weights) + 4)
    ids = torch.tensor([prompt_ids(20)])
    with torch.inference_mode():
        there, here = model(ids.cuda()).logits.cpu(), load("qwen3", dtype=dtype)(ids).logits
    torch.testing.assert_close(there, here, rtol=0, atol=1e-4 if dtype == torch.float32 else 0.3)


def test_a_forward_pass_has_no_stops_but_for_its_inputs_and_constants() -> None:
    model = load("qwen3", dtype=torch.float32).to("cuda")
    ids = torch.tensor([prompt_ids(20)]).cuda()
    with torch.inference_mode(), emulated.counting() as counts:
        model(ids)
    assert counts.of("sync") == counts.of("h2d") < 10 < counts.of("launch")
