"""The dry run of a model distinguishes rounding from a different computation, and takes little memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from distkv_dask.errors import UnsupportedModelError
from distkv_dask.geometry import Geometry, LayerKind
from distkv_dask.worker.model import in_float32 as widening
from distkv_dask.worker.model.first_layers import first_layers
from distkv_dask.worker.model.in_float32 import in_float32
from distkv_dask.worker.model.probe import probe


def tiny(kind: str, seed: int = 0, **settings: Any) -> Any:
    sizes: dict[str, Any] = {
        "vocab_size": 300,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,
        "tie_word_embeddings": False,
    }
    tokens = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
    torch.manual_seed(seed)
    config = transformers.CONFIG_MAPPING[kind](**(sizes | tokens | settings))
    model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model.to(torch.bfloat16).eval().requires_grad_(False)


@pytest.mark.parametrize("seed", [0, 1, 3, 4])
def test_rounding_that_sends_tokens_to_other_experts_is_no_other_computation(seed: int) -> None:
    sizes = {"num_hidden_layers": 8, "num_local_experts": 16, "num_experts_per_tok": 2, "intermediate_size": 128}
    probe(tiny("phimoe", seed, **sizes))


def test_a_model_that_converts_a_buffer_of_its_own_in_each_call_is_served() -> None:
    model = tiny("ctrl", n_embd=64, n_head=4, n_layer=2, dff=64)
    model.transformer.pos_encoding = model.transformer.pos_encoding.float()
    probe(model)


@pytest.mark.parametrize("leak", [0.3, 0.03, 0.01])
def test_a_model_of_16_bits_that_sees_a_little_of_later_tokens_is_refused(leak: float) -> None:
    model = tiny("llama")
    mlp = model.model.layers[1].mlp
    plain = mlp.forward

    def mixed(hidden: Tensor) -> Tensor:
        return plain(hidden + leak * hidden.mean(1, keepdim=True))

    mlp.forward = mixed
    with pytest.raises(UnsupportedModelError, match="does not compute the causal attention"):
        probe(model)


def state(model: Any) -> dict[str, tuple[int, torch.dtype]]:
    tensors = (*model.named_parameters(), *model.named_buffers())
    return {name: (tensor.data_ptr(), tensor.dtype) for name, tensor in tensors}


SIZES = [(1 << 62, 1 << 62), (0, 1 << 62), (0, 0), (1 << 14, 1 << 62)]
"""Weights widened with their layer; alone; not at all; in mixed ways."""


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
@pytest.mark.parametrize(("small", "large"), SIZES)
def test_a_model_in_float32_computes_as_one_and_is_then_as_before(
    kind: str, small: int, large: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(widening, "_SMALL", small)
    monkeypatch.setattr(widening, "_LARGE", large)
    model, ids = tiny(kind), torch.arange(20)[None]
    before = state(model)
    with torch.inference_mode(), in_float32(model, model.model.layers) as whole:
        found = model(ids).logits
    assert state(model) == before
    assert whole == (large > 0)
    with torch.inference_mode():
        wanted, rounded = tiny(kind).float()(ids).logits, model(ids).logits
    error = (found - wanted).norm() / wanted.norm()
    assert error < 1e-6 if whole else error < 3 * (rounded - wanted).norm() / wanted.norm()


@pytest.mark.parametrize("kind", ["llama", "phi"])  # without a bias of the head, and with one
def test_tables_of_a_vocabulary_are_not_copied(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(widening, "_SMALL", 1 << 14)
    model, ids = tiny(kind), torch.arange(20)[None]
    tables = model.get_input_embeddings(), model.get_output_embeddings()
    before, dtypes = state(model), set[torch.dtype]()

    def look(module: Any, *_: Any) -> None:
        dtypes.add(module.weight.dtype)

    hooks = [table.register_forward_pre_hook(look) for table in tables]
    with torch.inference_mode(), in_float32(model, model.model.layers) as whole:
        found = model(ids).logits
    for hook in hooks:
        hook.remove()
    assert whole
    assert state(model) == before
    assert dtypes == {torch.bfloat16}
    assert model(ids).logits.dtype == torch.bfloat16
    with torch.inference_mode():
        torch.testing.assert_close(found, tiny(kind).float()(ids).logits, rtol=1e-5, atol=1e-5)


def test_no_more_than_a_layer_is_wide_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    layers = model.model.layers
    wide: list[int] = []

    def look(*_: Any) -> None:
        wide.append(sum(weight.dtype == torch.float32 for layer in layers for weight in layer.parameters()))

    with torch.inference_mode(), in_float32(model, layers):
        for layer in layers:
            layer.register_forward_hook(look)
            layer.mlp.register_forward_hook(look)
        model(torch.arange(9)[None])
    assert set(wide) <= {0, len(list(layers[0].parameters()))}


def test_what_fails_inside_leaves_the_model_as_it_was() -> None:
    model = tiny("llama")
    before = state(model)
    model.model.layers[2].mlp.register_forward_hook(lambda *_: 1 // 0)
    with pytest.raises(ZeroDivisionError), torch.inference_mode(), in_float32(model, model.model.layers):
        model(torch.arange(9)[None])
    assert state(model) == before


def test_only_layers_up_to_the_last_new_kind_are_run() -> None:
    sizes = {"heads": 4, "kv_heads": 2, "head_dim": 16, "vocab_size": 300, "max_positions": 256, "dtype": "bfloat16"}
    model = tiny("llama", num_hidden_layers=6)
    layers = model.model.layers
    with first_layers(model, Geometry(layers=6, **sizes)) as few:
        assert model.model.layers is few
        assert [*few] == [*layers][:2]
    assert model.model.layers is layers
    kinds = (LayerKind("sliding", 8),) * 3 + (LayerKind(),) * 3
    with first_layers(model, Geometry(layers=6, layer_kinds=kinds, **sizes)) as few:
        assert len(few or ()) == 4
    model = tiny("qwen3_moe", num_hidden_layers=6, num_experts=4, mlp_only_layers=[0, 1, 2, 3], head_dim=16)
    with first_layers(model, Geometry(layers=6, **sizes)) as few:
        assert len(few or ()) == 5
