"""A GGUF file's metadata, applied to the configuration that transformers made from it, or refused.

Transformers reads some keys of each architecture and drops the others, as well as tensors without an equivalent. Here,
each key of the architecture has an equivalent or is refused by name, and so is each unused tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distkv_dask.errors import ModelError
from distkv_dask.models import gguf_rope
from distkv_dask.models.gguf_parts import GgufModel

_ATTRIBUTES: Mapping[str, tuple[str, ...]] = {
    "context_length": ("max_position_embeddings",),
    "embedding_length": ("hidden_size",),
    "vocab_size": ("vocab_size",),
    "feed_forward_length": ("intermediate_size", "n_inner", "ffn_hidden_size"),
    "attention.head_count": ("num_attention_heads",),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps", "norm_eps", "layer_norm_epsilon"),
    "attention.layer_norm_epsilon": ("layer_norm_epsilon", "layer_norm_eps", "norm_epsilon", "norm_eps"),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "final_logit_softcapping": ("final_logit_softcapping",),
    "use_parallel_residual": ("use_parallel_residual",),
    "expert_count": ("num_experts", "num_local_experts"),
    "expert_used_count": ("num_experts_per_tok",),
    "expert_feed_forward_length": ("moe_intermediate_size", "intermediate_size"),
    "expert_shared_feed_forward_length": ("shared_expert_intermediate_size",),
    "expert_weights_norm": ("norm_topk_prob",),
    "expert_weights_scale": ("routed_scaling_factor",),
}
"""Key -> its names in configurations; the first that exists is used."""

_ELSEWHERE = frozenset(
    (
        *("block_count", "nextn_predict_layers", "attention.head_count_kv", "attention.sliding_window"),
        *("attention.key_length", "attention.value_length", "attention.causal", "expert_gating_func"),
        *gguf_rope.KEYS,
    )
)
"""Keys that the functions below, and :mod:`.gguf_rope`, apply."""

_READ_BY_TRANSFORMERS = frozenset(
    (
        *("ssm.conv_kernel", "ssm.state_size", "ssm.group_count", "ssm.time_step_rank", "ssm.inner_size"),
        *("shortconv.l_cache", "full_attention_interval", "rope.dimension_sections"),
    )
)
"""Keys that transformers applies correctly in all architectures."""

_WITHOUT_MEANING = frozenset(("pooling_type", "tensor_data_layout"))

_SOFTMAX = 1
"""llama.cpp's number of the function that weights experts; transformers reads the others if it supports them."""

_REORDERED = frozenset(("llama", "mistral"))
"""Model types whose queries and keys llama.cpp has in another order."""

_SMALLER_SCALE = {"gemma2": 46, "gemma3": 62}
"""Architecture -> layers of its largest model, which alone divides scores by another number than its head size."""


def complete_config(config: Any, model: GgufModel) -> None:
    """Apply a GGUF file's metadata to a configuration.

    Parameters
    ----------
    config
        The text part of the configuration that transformers made from the file; changed in place.
    model
        The file, or its parts.

    Raises
    ------
    ModelError
        The message names a key that transformers' model does not have.
    """
    for kind, name in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        if f"tokenizer.ggml.{name}_token_id" not in model.fields:  # otherwise it is that of another model
            setattr(config, f"{kind}_token_id", None)
    keys = {key: value for key, value in model.keys.items() if key not in _WITHOUT_MEANING}
    if not keys.get("expert_count"):  # some dense models say that they have no experts
        keys = {key: value for key, value in keys.items() if not key.startswith("expert_")}
    for key, value in keys.items():
        if key in _ATTRIBUTES:
            _set(config, key, value)
        elif key not in _ELSEWHERE and key not in _READ_BY_TRANSFORMERS:
            raise ModelError(_no_place(config, key, value))
    if "block_count" in keys:
        config.num_hidden_layers = keys["block_count"] - keys.get("nextn_predict_layers", 0)
    if not keys.get("attention.causal", True):
        raise ModelError(_no_place(config, "attention.causal", False))
    if keys.get("expert_gating_func", _SOFTMAX) != _SOFTMAX and not hasattr(config, "scoring_func"):
        raise ModelError(_no_place(config, "expert_gating_func", keys["expert_gating_func"]))
    _set_heads(config, keys)
    _set_window(config, keys)
    gguf_rope.set_rope(config, keys, model.tensors)
    if (layers := _SMALLER_SCALE.get(model.architecture)) is not None:
        last = config.num_hidden_layers == layers
        config.query_pre_attn_scalar = config.hidden_size // config.num_attention_heads if last else config.head_dim


def check_tensors(config: Any, model: GgufModel) -> None:
    """Refuse a file with unused tensors; ``config`` is complete.

    Raises
    ------
    ModelError
        The message names some of them.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

    if not _read_by_names(model.architecture):
        return  # names are those of the checkpoint, and loading reports which of them it did not use
    with torch.device("meta"):
        made = AutoModelForCausalLM.from_config(config)
    kind: Any = TENSOR_PROCESSORS.get(model.architecture, TensorProcessor)
    places = set(get_gguf_hf_weights_map(made, kind(config=config.to_dict())))
    places |= {f"{name}.weight" for name in places} | {"output.weight"}  # experts; a head tied or not
    further = (gguf_rope.FACTORS, gguf_rope.LONG, gguf_rope.SHORT)
    if unused := sorted(name for name in model.tensors if name not in places and name not in further):
        raise ModelError(
            f"its tensors {', '.join(unused[:3])} ({len(unused)} in all) have no place in model type "
            f"{config.model_type!r} of transformers: choose safetensors of this model"
        )


def _read_by_names(architecture: str) -> bool:
    """Whether transformers maps tensors by their names; newer architectures have a list of conversions instead."""
    try:
        from transformers.integrations.gguf.utils import is_gguf_arch_supported
    except ImportError:
        return True
    return not is_gguf_arch_supported(architecture)


def _no_place(config: Any, key: str, value: Any) -> str:
    return (
        f"it says {key} = {value!r:.60}, for which model type {config.model_type!r} of transformers has no place: its "
        "answers would be wrong. Choose safetensors of this model"
    )


def _set(config: Any, key: str, value: Any) -> None:
    for name in _ATTRIBUTES[key]:
        if hasattr(config, name):
            setattr(config, name, value)
            return
    raise ModelError(_no_place(config, key, value))


def _set_heads(config: Any, keys: Mapping[str, Any]) -> None:
    """Numbers and size of heads, which have their own defaults in llama.cpp."""
    heads = config.num_attention_heads
    if config.model_type in _REORDERED and "attention.head_count_kv" not in keys:
        raise ModelError(
            "it says no attention.head_count_kv, without which transformers leaves rows of its queries and keys in the "
            "order of llama.cpp: choose a newer conversion, or safetensors of this model"
        )
    kv_heads = keys.get("attention.head_count_kv", heads)
    if isinstance(kv_heads, list):  # layers without attention have none
        kv_heads = max(kv_heads)
        if {*keys["attention.head_count_kv"]} - {0, kv_heads}:
            raise ModelError(_no_place(config, "attention.head_count_kv", keys["attention.head_count_kv"]))
    if hasattr(config, "num_key_value_heads"):
        config.num_key_value_heads = kv_heads
    elif kv_heads != heads:
        raise ModelError(_no_place(config, "attention.head_count_kv", kv_heads))
    size = keys.get("attention.key_length", config.hidden_size // heads)
    if keys.get("attention.value_length", size) != size:
        raise ModelError(_no_place(config, "attention.value_length", keys["attention.value_length"]))
    if hasattr(config, "head_dim"):
        config.head_dim = size
    elif size != config.hidden_size // heads:
        raise ModelError(_no_place(config, "attention.key_length", size))


def _set_window(config: Any, keys: Mapping[str, Any]) -> None:
    window = keys.get("attention.sliding_window") or 0
    kinds = getattr(config, "layer_types", None) or ()
    if "sliding_attention" in kinds:
        config.sliding_window = window or config.sliding_window
    elif not window or window >= config.max_position_embeddings:
        if hasattr(config, "sliding_window"):
            config.sliding_window = None
    elif kinds or not hasattr(config, "sliding_window"):
        raise ModelError(_no_place(config, "attention.sliding_window", window))
    else:
        config.sliding_window = window
