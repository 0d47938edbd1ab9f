"""Tiny models as GGUF files like those of llama.cpp's converter: names, metadata, and its changes to weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers

ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mixtral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen2_moe": gguf.MODEL_ARCH.QWEN2MOE,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "qwen3_moe": gguf.MODEL_ARCH.QWEN3MOE,
    "phi3": gguf.MODEL_ARCH.PHI3,
    "stablelm": gguf.MODEL_ARCH.STABLELM,
    "starcoder2": gguf.MODEL_ARCH.STARCODER2,
    "nemotron": gguf.MODEL_ARCH.NEMOTRON,
    "gemma2": gguf.MODEL_ARCH.GEMMA2,
    "gemma3_text": gguf.MODEL_ARCH.GEMMA3,
    "gpt2": gguf.MODEL_ARCH.GPT2,
}
"""transformers' model type -> gguf's architecture."""


def metadata(config: Any) -> dict[str, Any]:
    """Keys of the architecture that every converter writes."""
    heads = config.num_attention_heads
    said = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
        "attention.head_count": heads,
        "attention.head_count_kv": getattr(config, "num_key_value_heads", heads),
        "vocab_size": config.vocab_size,
    }
    for name in ("rms_norm_eps", "norm_eps", "layer_norm_eps", "norm_epsilon", "layer_norm_epsilon"):
        if hasattr(config, name):
            kind = "layer_norm_rms_epsilon" if name == "rms_norm_eps" else "layer_norm_epsilon"
            said[f"attention.{kind}"] = getattr(config, name)
    return said


def write_gguf(folder: Path, file: Path, said: Mapping[str, Any] = {}, parts: int = 1, **extra: np.ndarray) -> Path:
    """Write the model saved in ``folder`` in float32; returns the first part.

    Parameters
    ----------
    folder, file
        A model saved by transformers, and the path of the GGUF file.
    said
        Keys of the architecture, without its name, in addition to those of :func:`metadata`; None removes one.
    parts
        Number of files into which the model is split.
    extra
        Additional tensors, in whose names ``_weight`` stands for ``.weight``.
    """
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = model.config
    architecture = ARCHITECTURES[config.model_type]
    name = gguf.MODEL_ARCH_NAMES[architecture]
    tensors = dict(_tensors(model, architecture)) | {
        key.removesuffix("_weight") + ".weight": value for key, value in extra.items()
    }
    per_part = -(-len(tensors) // parts)
    writer = gguf.GGUFWriter(file, name, split_max_tensors=per_part if parts > 1 else 0)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name("tiny")
    for key, value in (metadata(config) | dict(said)).items():
        if value is not None:
            _add(writer, f"{name}.{key}", value)
    for key, values in tensors.items():
        writer.add_tensor(key, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file if parts == 1 else file.with_name(f"{file.stem}-00001-of-{parts:05}.gguf")


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    match value:
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)
        case _:
            writer.add_array(key, value)


def _tensors(model: Any, architecture: gguf.MODEL_ARCH) -> Iterator[tuple[str, np.ndarray]]:
    config = model.config
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    weights = model.state_dict()
    if config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    for hf, weight in weights.items():
        values = weight.float().numpy()
        if hf.endswith("mlp.experts.gate_up_proj"):
            layer = hf.split(".")[2]
            gate, up = np.split(values, 2, axis=1)
            yield f"blk.{layer}.ffn_gate_exps.weight", np.ascontiguousarray(gate)
            yield f"blk.{layer}.ffn_up_exps.weight", np.ascontiguousarray(up)
            continue
        if hf.endswith("mlp.experts.down_proj"):
            yield f"blk.{hf.split('.')[2]}.ffn_down_exps.weight", values
            continue
        stem, dot, suffix = hf.rpartition(".")
        name = names.get_name(stem)
        assert name is not None, hf
        yield name + dot + suffix, _changed(config, name, suffix, values)


def _changed(config: Any, name: str, suffix: str, values: np.ndarray) -> np.ndarray:
    """A weight as changed by llama.cpp's converter."""
    kind = config.model_type
    if kind in ("llama", "mixtral") and name.endswith((".attn_q", ".attn_k")):
        heads = config.num_attention_heads if name.endswith("q") else config.num_key_value_heads
        shape = values.shape
        values = values.reshape(heads, 2, shape[0] // heads // 2, *shape[1:]).swapaxes(1, 2).reshape(shape)
    if kind in ("gemma2", "gemma3_text", "nemotron") and name.endswith("norm") and suffix == "weight":
        values = values + 1
    if kind == "gpt2" and values.ndim == 2 and name.endswith(("attn_qkv", "attn_output", "ffn_up", "ffn_down")):
        values = values.T
    if name.endswith("ffn_gate_inp_shexp"):
        values = values[0]
    return np.ascontiguousarray(values)
