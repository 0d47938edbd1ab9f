"""The C++ core computes layers of known code, and leaves all others as they are."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from distkv_dask.geometry import Geometry
from distkv_dask.kernels import few_rows
from distkv_dask.worker.model import decoder_layers
from distkv_dask.worker.model.decoder_layers import CoreLayer, use_core
from distkv_dask.worker.model.hook import IMPLEMENTATION, attending_with
from distkv_dask.worker.model.packed import Choice, pack_linears
from tests._models import FAMILIES, VOCAB

pytestmark = pytest.mark.skipif(few_rows.native_kernel.missing() is not None, reason="no C++ core")
KNOWN = ["llama-mha", "llama-gqa", "qwen3", "mistral"]
MOST = 24


class Causal:
    """Attention of one sequence, in float32."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, sinks: Tensor | None = None) -> Tensor:
        keys, values = (one.float().repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(0, 1) for one in (k, v))
        hidden = torch.full((len(q), len(k)), -torch.inf).triu(1)
        scores = q.float().transpose(0, 1) @ keys.transpose(1, 2) * scale + hidden
        return (scores.softmax(-1) @ values).transpose(0, 1).contiguous().to(v.dtype)


def model(family: str, dtype: torch.dtype = torch.bfloat16) -> Any:
    torch.manual_seed(3)
    config = FAMILIES[family]()
    made = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=IMPLEMENTATION).eval()
    return made.to(torch.bfloat16).to(dtype)  # the same weights in any dtype


def packed(family: str) -> Any:
    made = model(family)
    assert pack_linears(made, 1 << 30, lambda: Choice(((MOST, few_rows.MODEL),), alone=4))
    return made


def logits(of: Any, tokens: int, attention: Any = None) -> Tensor:
    config = of.config
    sizes = Geometry(
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        vocab_size=VOCAB,
        max_positions=config.max_position_embeddings,
        dtype="bfloat16",
    )
    ids, positions = torch.arange(tokens)[None] * 7 % VOCAB, torch.arange(tokens)[None]
    with torch.inference_mode(), attending_with(attention or Causal(), positions[0], sizes):
        found: Tensor = of(input_ids=ids, position_ids=positions, use_cache=False).logits[0].float()
    return found


@pytest.mark.parametrize("family", KNOWN)
@pytest.mark.parametrize("tokens", [1, 9, MOST])
def test_known_layers_are_as_near_to_float32_as_transformers_own(family: str, tokens: int) -> None:
    made = packed(family)
    assert use_core(made) == len(made.model.layers)
    exact, plain, found = (logits(one, tokens) for one in (model(family, torch.float32), model(family), made))
    error, theirs = (float((one - exact).norm() / exact.norm()) for one in (found, plain))
    assert error < 1.3 * theirs + 1e-3
    assert error < 0.05


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - KNOWN))
def test_other_layers_stay_transformers_own(family: str) -> None:
    made = packed(family)
    before = logits_or_none(made)
    assert use_core(made) == 0
    assert not any(isinstance(vars(module).get("forward"), CoreLayer) for module in made.modules())
    assert before is None or torch.equal(logits(made, 9), before)


def logits_or_none(made: Any) -> Tensor | None:
    """Logits of the model with this file's simple attention."""
    return logits(made, 9) if made.config.model_type in ("qwen2", "llama") else None


def test_more_rows_than_the_core_serves_are_computed_by_transformers() -> None:
    made, plain = packed("llama-gqa"), packed("llama-gqa")
    use_core(made)
    assert torch.equal(logits(made, MOST + 1), logits(plain, MOST + 1))


@pytest.mark.parametrize("change", ["dtype", "size", "rows"])
def test_rotary_embeddings_of_another_form_are_left_to_transformers(change: str) -> None:
    made, plain = packed("llama-gqa"), packed("llama-gqa")
    use_core(made)
    for one in (made, plain):
        real = one.model.rotary_emb.forward

        def other(*given: Any, real: Any = real, **named: Any) -> Any:
            if change == "dtype":
                return tuple(found.float() for found in real(*given, **named))
            return tuple(found[..., :1] if change == "size" else found[:, :1] for found in real(*given, **named))

        one.model.rotary_emb.forward = other
    assert torch.equal(logits(made, 5), logits(plain, 5))


def test_modules_that_somebody_watches_are_called() -> None:
    made, plain, seen = packed("llama-gqa"), packed("llama-gqa"), []
    use_core(made)
    watched = made.model.layers[1].mlp.up_proj
    handle = watched.register_forward_hook(lambda *call: seen.append(call[2].shape))
    assert_close(logits(made, 3), logits(plain, 3))
    assert seen == [(1, 3, 128)]
    handle.remove()
    logits(made, 3)
    assert len(seen) == 1


def test_layers_are_found_wherever_a_model_keeps_them() -> None:
    made = packed("llama-gqa")
    made.config.num_hidden_layers = 99  # as in models that have no list of all layers
    assert use_core(made) == 3


def test_layers_attend_in_order_with_their_scale() -> None:
    class Asked(Causal):
        def __init__(self) -> None:
            self.calls: list[tuple[int, float]] = []

        def attend(self, layer: int, *tensors: Tensor, **options: Any) -> Tensor:
            self.calls.append((layer, float(tensors[3])))
            return super().attend(layer, *tensors, **options)

    made, asked = packed("llama-gqa"), Asked()
    use_core(made)
    logits(made, 2, asked)
    assert asked.calls == [(layer, 64**-0.5) for layer in range(3)]


def test_a_layer_with_another_forward_of_its_own_is_left_alone() -> None:
    made = packed("llama-gqa")
    layer = made.model.layers[0]
    layer.mlp.forward = layer.mlp.forward
    made.model.layers[1].self_attn.q_proj.forward = made.model.layers[1].self_attn.k_proj.forward
    assert use_core(made) == 1


def test_a_changed_rotary_embedding_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    made = packed("mistral")
    of = decoder_layers.inspect.unwrap(type(made.model.layers[0].self_attn).forward).__globals__
    monkeypatch.setitem(of, "rotate_half", lambda x: -x)
    assert use_core(made) == 0


def test_a_model_is_freed_at_once() -> None:
    made = packed("llama-gqa")
    use_core(made)
    gone = weakref.ref(made.model.layers[0])
    gc.collect()
    gc.disable()
    try:
        del made
        assert gone() is None
    finally:
        gc.enable()


def assert_close(found: Tensor, right: Tensor) -> None:
    torch.testing.assert_close(found, right, rtol=0.02, atol=0.02 * float(right.abs().max()))
