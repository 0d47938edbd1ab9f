"""A GGUF file gives the same model as its folder: everything in it is used, or refused by name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from _gguf import write_gguf

from distkv_dask.errors import ModelError
from distkv_dask.models.gguf_cache import converted_weights
from distkv_dask.models.source import resolve_model

TOKENS = torch.randint(0, 300, (1, 90), generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def save(folder: Path, kind: str, **settings: Any) -> Path:
    """A tiny model of a type, with norms that are not all ones."""
    sizes: dict[str, Any] = {
        "vocab_size": 300,
        "hidden_size": 64,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    torch.manual_seed(3)
    config = transformers.CONFIG_MAPPING[kind](**(sizes | settings))
    model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(0, 0.2) if weight.ndim > 1 else weight.add_(0.1 * torch.randn_like(weight))
    model.save_pretrained(folder)
    return folder


def logits(folder: Path, config: Any = None) -> torch.Tensor:
    load: Any = transformers.AutoModelForCausalLM.from_pretrained
    model = load(folder, config=config, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.inference_mode():
        return model(TOKENS).logits


def check_same(folder: Path, file: Path) -> None:
    """Plain transformers computes the same from the folder and from our conversion of the file."""
    source = resolve_model(str(file))
    ours = logits(converted_weights(Path(source.location), "float32"), source.config())
    torch.testing.assert_close(ours, logits(folder), rtol=1e-4, atol=1e-4)


ROPE = {"rope_theta": 50000.0, "original_max_position_embeddings": 32}
FAMILIES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "llama": ({}, {"rope.dimension_count": 16}),
    "llama with other heads": (
        {"kind": "llama", "head_dim": 24},
        {"rope.dimension_count": 24, "attention.key_length": 24, "attention.value_length": 24},
    ),
    "qwen2, a key for each head": ({"num_key_value_heads": 4}, {"attention.head_count_kv": None}),
    "llama, linear": (
        {"kind": "llama", "rope_parameters": {"rope_theta": 50000.0, "rope_type": "linear", "factor": 4.0}},
        {"rope.freq_base": 50000.0, "rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
    ),
    "qwen2": ({"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}, {"rope.freq_base": 1e6}),
    "qwen2, yarn": (
        {"kind": "qwen2", "rope_parameters": {**ROPE, "rope_type": "yarn", "factor": 4.0}},
        {
            "rope.freq_base": 50000.0,
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 4.0,
            "rope.scaling.original_context_length": 32,
            "rope.scaling.finetuned": True,
        },
    ),
    "qwen3": ({"head_dim": 24}, {"attention.key_length": 24, "attention.value_length": 24}),
    "qwen3_moe": (
        {
            "head_dim": 16,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "norm_topk_prob": True,
        },
        {
            "attention.key_length": 16,
            "attention.value_length": 16,
            "expert_count": 4,
            "expert_used_count": 2,
            "expert_feed_forward_length": 32,
        },
    ),
    "qwen2_moe": (
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 40,
        },
        {
            "expert_count": 4,
            "expert_used_count": 2,
            "expert_feed_forward_length": 32,
            "expert_shared_feed_forward_length": 40,
        },
    ),
    "phi3": ({}, {"rope.dimension_count": 16}),
    "phi3, window": ({"kind": "phi3", "sliding_window": 20}, {"attention.sliding_window": 20}),
    "stablelm": (
        {"rope_parameters": {"rope_theta": 20000.0, "rope_type": "default", "partial_rotary_factor": 0.5}},
        {"rope.dimension_count": 8, "rope.freq_base": 20000.0, "use_parallel_residual": False},
    ),
    "starcoder2": ({"rope_parameters": {"rope_theta": 1e5, "rope_type": "default"}}, {"rope.freq_base": 1e5}),
    "nemotron": (
        {
            "head_dim": 16,
            "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default", "partial_rotary_factor": 0.5},
        },
        {"rope.dimension_count": 8},
    ),
    "gemma2": (
        {
            "head_dim": 24,
            "query_pre_attn_scalar": 24,
            "sliding_window": 16,
            "attn_logit_softcapping": 20.0,
            "final_logit_softcapping": 10.0,
            "tie_word_embeddings": True,
        },
        {
            "attention.key_length": 24,
            "attention.value_length": 24,
            "attention.sliding_window": 16,
            "attn_logit_softcapping": 20.0,
            "final_logit_softcapping": 10.0,
        },
    ),
    "gemma3_text": (
        {
            "num_hidden_layers": 7,
            "head_dim": 24,
            "query_pre_attn_scalar": 24,
            "sliding_window": 16,
            "tie_word_embeddings": True,
            "rope_parameters": {
                "full_attention": {"rope_theta": 1e6, "rope_type": "linear", "factor": 8.0},
                "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"},
            },
        },
        {
            "attention.key_length": 24,
            "attention.value_length": 24,
            "attention.sliding_window": 16,
            "rope.freq_base": 1e6,
            "rope.scaling.type": "linear",
            "rope.scaling.factor": 8.0,
        },
    ),
    "gpt2": ({"n_positions": 128, "n_inner": 48}, {"attention.head_count_kv": 4}),
}
"""Name of a model -> its configuration, and further keys of its GGUF file."""


@pytest.mark.parametrize("name", FAMILIES)
def test_a_gguf_file_computes_what_its_model_does(name: str, tmp_path: Path) -> None:
    settings, said = FAMILIES[name]
    settings = dict(settings)
    folder = save(tmp_path / "model", settings.pop("kind", name.partition(",")[0]), **settings)
    check_same(folder, write_gguf(folder, tmp_path / "model.gguf", said))


def llama3_factors(factor: float, low: float, high: float, original: int, base: float, dim: int) -> list[float]:
    """Factors as computed by llama.cpp's converter from a Llama 3.1 configuration."""
    factors = []
    for frequency in (1 / base ** (at / dim) for at in range(0, dim, 2)):
        length = 2 * math.pi / frequency
        smooth = (original / length - low) / (high - low)
        between = 1 / ((1 - smooth) / factor + smooth)
        factors.append(1.0 if length < original / high else factor if length > original / low else between)
    return factors


def test_frequencies_of_llama_3_are_divided_by_their_factors(tmp_path: Path) -> None:
    rope = {**ROPE, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    folder = save(tmp_path / "model", "llama", rope_parameters=rope)
    factors = np.array(llama3_factors(8.0, 1.0, 4.0, 32, 50000.0, 16), np.float32)
    assert any(1.0 < factor < 8.0 for factor in factors)
    file = write_gguf(folder, tmp_path / "m.gguf", {"rope.freq_base": 50000.0}, rope_freqs_weight=factors)
    check_same(folder, file)


@pytest.mark.parametrize(("original", "kind"), [(128, "short"), (32, "long")])
def test_factors_for_short_and_long_sequences_are_those_of_longrope(original: int, kind: str, tmp_path: Path) -> None:
    short, long = [1.0 + at / 8 for at in range(8)], [2.0 + at for at in range(8)]
    rope = {"short_factor": short, "long_factor": long, "original_max_position_embeddings": original}
    rope |= {"rope_type": "longrope", "rope_theta": 10000.0, "attention_factor": 1.25}
    folder = save(tmp_path / "model", "phi3", rope_parameters=rope, original_max_position_embeddings=original)
    said = {"rope.scaling.original_context_length": original, "rope.scaling.attn_factor": 1.25}
    arrays = {
        f"rope_factors_{name}_weight": np.array(one, np.float32) for name, one in (("short", short), ("long", long))
    }
    check_same(folder, write_gguf(folder, tmp_path / "m.gguf", said, **arrays))


def test_a_file_in_parts_is_read_whole_whichever_part_is_named(tmp_path: Path) -> None:
    folder = save(tmp_path / "model", "llama")
    first = write_gguf(folder, tmp_path / "m.gguf", parts=3)
    parts = sorted(tmp_path.glob("m-*.gguf"))
    assert len(parts) == 3
    for part in parts:
        assert resolve_model(str(part)) == resolve_model(str(first))
        check_same(folder, part)
    assert [one.name for one in (tmp_path / "cache").rglob("*.gguf")] == []


def test_a_part_that_is_missing_is_named(tmp_path: Path) -> None:
    first = write_gguf(save(tmp_path / "model", "llama"), tmp_path / "m.gguf", parts=3)
    (tmp_path / "m-00002-of-00003.gguf").unlink()
    with pytest.raises(ModelError, match=r"m-00002-of-00003\.gguf is missing"):
        resolve_model(str(first))


def test_a_part_under_another_name_is_not_the_model(tmp_path: Path) -> None:
    first = write_gguf(save(tmp_path / "model", "llama"), tmp_path / "m.gguf", parts=3)
    with pytest.raises(ModelError, match="one of 3 parts"):
        resolve_model(str(first.rename(tmp_path / "first.gguf"))).config()


def test_parts_of_different_models_are_refused(tmp_path: Path) -> None:
    folder = save(tmp_path / "model", "llama")
    first = write_gguf(folder, tmp_path / "m.gguf", parts=3)
    (tmp_path / "m-00002-of-00003.gguf").write_bytes((tmp_path / "m-00003-of-00003.gguf").read_bytes())
    with pytest.raises(ModelError, match="belong to different models"):
        resolve_model(str(first)).config()


REFUSED: dict[str, tuple[Mapping[str, Any], str]] = {
    "experts of a dense model": ({"expert_count": 8, "expert_used_count": 2}, "expert_count = 8"),
    "a window": ({"attention.sliding_window": 64}, "attention.sliding_window = 64"),
    "a soft cap": ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
    "a scale of scores": ({"attention.scale": 0.5}, "attention.scale = 0.5"),
    "a scale of embeddings": ({"embedding_scale": 12.0}, "embedding_scale"),
    "attention that is not causal": ({"attention.causal": False}, "attention.causal"),
    "latent attention": ({"attention.kv_lora_rank": 512}, "kv_lora_rank"),
    "values of another size": ({"attention.key_length": 16, "attention.value_length": 8}, "value_length = 8"),
    "part of a head rotated": ({"rope.dimension_count": 8}, "rotates 8 of 16"),
    "an unknown scaling": ({"rope.scaling.type": "su", "rope.scaling.factor": 2.0}, "'su'"),
    "YaRN of no known length": ({"rope.scaling.type": "yarn", "rope.scaling.factor": 2.0}, "original_context_length"),
    "no number of kv heads": ({"attention.head_count_kv": None}, "no attention.head_count_kv"),
    "a key of tomorrow": ({"attention.tomorrow": 3}, "attention.tomorrow = 3"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_model_of_transformers_has_no_place_for_is_named(name: str, tmp_path: Path) -> None:
    said, words = REFUSED[name]
    file = write_gguf(save(tmp_path / "model", "llama"), tmp_path / "m.gguf", said)
    with pytest.raises(ModelError, match=words):
        resolve_model(str(file)).config()


def test_experts_that_are_weighed_in_another_way_are_named(tmp_path: Path) -> None:
    settings, said = FAMILIES["qwen3_moe"]
    folder = save(tmp_path / "model", "qwen3_moe", **settings)
    for function, served in ((1, True), (2, False)):
        file = write_gguf(folder, tmp_path / f"{function}.gguf", said | {"expert_gating_func": function})
        if served:
            check_same(folder, file)
            continue
        with pytest.raises(ModelError, match="expert_gating_func = 2"):
            resolve_model(str(file)).config()


@pytest.mark.parametrize("tensor", ["blk.1.attn_q.bias", "blk.0.attn_sinks.weight", "blk.0.ffn_gate_exps.weight"])
def test_a_tensor_that_no_weight_comes_from_is_named(tensor: str, tmp_path: Path) -> None:
    folder = save(tmp_path / "model", "llama")
    file = write_gguf(folder, tmp_path / "m.gguf", **{tensor.removesuffix(".weight"): np.ones(64, np.float32)})
    file = tmp_path / "m.gguf"
    with pytest.raises(ModelError, match=r"its tensors blk\..* have no place"):
        resolve_model(str(file)).config()


def test_a_weight_that_is_missing_is_named(tmp_path: Path) -> None:
    folder = save(tmp_path / "model", "llama", num_hidden_layers=1)
    file = write_gguf(folder, tmp_path / "m.gguf", {"block_count": 2})
    source = resolve_model(str(file))
    with pytest.raises(ModelError, match=r"drawn at random: model\.layers\.1"):
        converted_weights(Path(source.location), "float32")


def test_a_vision_projector_is_no_language_model(tmp_path: Path) -> None:
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "mmproj.gguf", "clip")
    writer.add_type("mmproj")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError, match="no language model"):
        resolve_model(str(tmp_path / "mmproj.gguf")).config()
