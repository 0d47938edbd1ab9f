"""Tiny configurations and random weights of every causal model type of the installed transformers.

Sizes are set by the names that configurations use for them; layers are reduced to one or two of each kind in the
default configuration; windows are a few tokens long. Types that need other settings are in ``SPECIAL``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

VOCAB, MAX_POSITIONS, WINDOW, LAYERS = 64, 512, 8, 3

NOT_CAUSAL = frozenset(
    (
        *("bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "marian", "mbart", "mvp", "pegasus", "plbart"),
        *("prophetnet", "whisper", "musicgen", "musicgen_melody", "trocr", "moshi", "moss_transcribe_diarize"),
        *("bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert"),
        *("rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta", "xlm-roberta-xl"),
        *("xmod", "xlm", "reformer", "xlnet", "git", "gemma4_assistant", "gemma4_unified_assistant", "blt"),
    )
)
"""Types that transformers also maps to causal models, although the models are encoders or need other input."""

TEXT_PARTS = (
    "mistral3",
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "qwen3_vl_moe",
    "llava",
    "internvl",
    "idefics3",
    "smolvlm",
)
"""Vision-language types to try as text models, in addition to the causal mapping."""

SIZES: Mapping[str, Any] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "decoder_vocab_size"), VOCAB),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), MAX_POSITIONS),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "word_embed_proj_dim", "dim_model", "embedding_dim"), 64),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "num_blocks"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads"), 2),
    **dict.fromkeys(("swa_num_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("head_dim", "swa_head_dim", "global_head_dim", "kv_channels", "dim_head", "linear_head_dim"), 16),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "dim_ff", "dff", "ffn_hidden_size", "decoder_ffn_dim"), 48),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 32),
    **dict.fromkeys(("shared_intermediate_size", "shared_experts_intermediate_size", "intermediate_size_mlp"), 32),
    **dict.fromkeys(("moe_shared_expert_intermediate_size", "dense_intermediate_size"), 32),
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts"), 2),
    **dict.fromkeys(("n_group", "topk_group"), 1),
    **dict.fromkeys(("sliding_window", "window_size", "attention_window_size", "sliding_window_size"), WINDOW),
    **dict.fromkeys(("attention_chunk_size", "local_attention", "local_attention_window_len"), WINDOW),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "o_lora_rank"), 24),
    **dict.fromkeys(("qk_nope_head_dim", "v_head_dim"), 16),
    "qk_rope_head_dim": 8,
    **dict.fromkeys(("rotary_dim",), 8),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_heads"), 2),
    **dict.fromkeys(("linear_num_value_heads", "mamba_n_heads", "mamba_num_heads", "n_mamba_heads"), 4),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "mamba_d_state", "ssm_state_size"), 16),
    "state_size": 16,
    **dict.fromkeys(("mamba_dt_rank", "time_step_rank", "laurel_rank", "adapter_rank", "router_hidden_size"), 8),
    **dict.fromkeys(("hidden_size_per_layer_input", "gated_norm_rank"), 16),
    **dict.fromkeys(("mamba_chunk_size", "chunk_size"), 16),
    **dict.fromkeys(("n_groups", "mamba_n_groups", "mamba_ngroups"), 2),
    "lru_width": 64,
    **dict.fromkeys(("floor_scale", "log_scaling_n_floor"), WINDOW),
    "original_max_position_embeddings": 16,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "num_mtp_layers": 0,
    "num_nextn_predict_layers": 0,
    "max_window_layers": 1,
    "pretraining_tp": 1,
}
"""Name of a size in any configuration -> its tiny value."""

LISTS = ("layer_types", "mlp_layer_types", "layers_block_type", "block_types", "indexer_types", "no_rope_layers")
"""Lists with an entry for each layer."""

_HYBRID = ["linear_attention", "full_attention", "linear_attention"]
_MIXED = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
_ROPE_BY_KIND = {kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in set(_MIXED)}
_QSA = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 16,
    "indexer_compress_ratio": 4,
    "ple_layer_ids": [1],
    "ple_embed_dim": 64,
    "heads_per_ngram": 2,
    "ngram_vocab_size_base": 100,
    "split_ngram_parts": 2,
}

SPECIAL: Mapping[str, Mapping[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {"layer_types": _MIXED, "rope_parameters": _ROPE_BY_KIND},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "gemma3n_text": {
        "layer_types": _MIXED,
        "num_kv_shared_layers": 2,
        "activation_sparsity_pattern": [0.9, 0.9, 0.0, 0.0],
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "num_layers": 4},
    "granitemoehybrid": {"layer_types": _HYBRID, "mamba_n_heads": 8},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "jamba": {"attn_layer_period": 3, "attn_layer_offset": 1},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "mamba2": {"num_heads": 8},
    "ministral": {"head_dim": 16},
    "nemotron": {"num_key_value_heads": 2},
    "qwen2_vl": {"text_config": {"rope_parameters": _MROPE}},
    "qwen2_5_vl": {"text_config": {"rope_parameters": _MROPE}},
    "qwen4_exp": {"text_config": _QSA},
    "qwen4_exp_text": _QSA,
    "xlstm": {"chunk_size": 64, "qk_dim_factor": 1.0},
    "zamba": {"attention_hidden_size": 128, "attention_head_dim": 32},
    "zaya": {"num_experts_per_tok": 1},
}
"""Model type -> settings that its own rules need."""

VARIANTS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "gemma4_text, layers share KV": ("gemma4_text", {"layer_types": _MIXED, "num_kv_shared_layers": 2}),
    "granitemoehybrid, dense": ("granitemoehybrid", {"layer_types": ["full_attention"] * 3}),
    "deepseek_v2, no q_lora_rank": ("deepseek_v2", {"q_lora_rank": None}),
    "mistral, no window": ("mistral", {"sliding_window": None}),
    "qwen2, windows": ("qwen2", {"use_sliding_window": True, "sliding_window": WINDOW, "layer_types": _MIXED}),
    "llama, head size 12": ("llama", {"head_dim": 12}),
    "llama, llama3 rope": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            }
        },
    ),
    "llama, yarn": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 16,
            }
        },
    ),
    "phi3, longrope": (
        "phi3",
        {
            "original_max_position_embeddings": 16,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.0] * 8,
                "long_factor": [2.0 + at for at in range(8)],
                "original_max_position_embeddings": 16,
            },
        },
    ),
}
"""Further models of a type: name -> type, settings."""


def types() -> list[str]:
    """Every causal model type, some vision-language ones, and variants of some."""
    return [*sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES), *TEXT_PARTS, *VARIANTS]


def tiny_config(name: str) -> Any:
    """A tiny configuration of a type or variant."""
    kind, variant = VARIANTS.get(name, (name, {}))
    made = CONFIG_MAPPING[kind](**_settings(CONFIG_MAPPING[kind], {**SPECIAL.get(kind, {}), **variant}))
    for config in (made, made.get_text_config()):
        config.pad_token_id, config.bos_token_id, config.eos_token_id = 0, 0, VOCAB - 1
    return made


def _settings(kind: Any, special: Mapping[str, Any]) -> dict[str, Any]:
    default = kind()
    names = [field.name for field in dataclasses.fields(kind)]
    settings: dict[str, Any] = {}
    for name in names:
        value = default.__dict__.get(name)
        if isinstance(value, transformers.PreTrainedConfig):
            settings[name] = _settings(type(value), special.get(name, {})) | {"model_type": value.model_type}
        elif name in SIZES and value is not None and not isinstance(value, list | dict | bool):
            settings[name] = SIZES[name]
        elif name.endswith(("_token_id", "_token_index")) and isinstance(value, int) and value >= VOCAB:
            settings[name] = VOCAB - 1
    rope = default.__dict__.get("rope_parameters")
    if isinstance(rope, dict) and "original_max_position_embeddings" in rope:
        settings["rope_parameters"] = rope | {"original_max_position_embeddings": 2 * WINDOW}
    if settings.get("kv_lora_rank"):  # latent attention: all heads have keys, whose rotary size this name means
        settings |= {"num_key_value_heads": 4, "head_dim": SIZES["qk_rope_head_dim"]}
    lists = {name: default.__dict__[name] for name in LISTS if isinstance(default.__dict__.get(name), list | tuple)}
    if lists:
        settings |= _few_layers(lists)
    plain = {"tie_word_embeddings": False, "eos_token_id": VOCAB - 1}
    settings |= {name: value for name, value in plain.items() if name in names}
    settings |= {name: value for name, value in special.items() if not isinstance(settings.get(name), dict)}
    if "layer_types" in special and "num_layers" not in special:
        settings["num_hidden_layers"] = len(special["layer_types"])
    return settings


def _few_layers(lists: Mapping[str, Any]) -> dict[str, Any]:
    """One layer of each kind that these lists tell apart, and at least three layers."""
    kinds = list(dict.fromkeys(zip(*lists.values(), strict=False)))[:6]
    while len(kinds) < LAYERS:
        kinds += kinds
    return dict(zip(lists, map(list, zip(*kinds, strict=True)), strict=True)) | {"num_hidden_layers": len(kinds)}


def tiny_model(name: str, seed: int) -> Any:
    """A tiny model with random weights that depend only on the seed, drawn wide so that greedy tokens vary."""
    kind, config = VARIANTS.get(name, (name, {}))[0], tiny_config(name)
    torch.manual_seed(seed)
    auto: Any = transformers.AutoModelForCausalLM
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        auto = transformers.AutoModelForImageTextToText
    model = auto.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim >= 2:
                weight.normal_(0, 0.3)
            elif weight.is_floating_point():
                weight.add_(0.1 * torch.randn_like(weight))
    return model
