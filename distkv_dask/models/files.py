"""Checks of a model's folder before transformers reads it: folders are untrusted.

Nothing in a folder can run code or fetch anything: keys of its configuration that name kernels, code or other places
are left out. Damage is reported. Weights: :mod:`distkv_dask.models.weight_files`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from distkv_dask.errors import ModelError, in_words
from distkv_dask.models.layer_values import layer_values, layers_of

LARGEST_JSON = 64 << 20
"""Bytes of the largest configuration or index."""
LARGEST_TEMPLATE = 1 << 20
"""Bytes of the largest chat template."""
DEEPEST = 32
"""Maximum nesting of a configuration's values."""

_DROPPED = frozenset(
    (
        *("_attn_implementation", "attn_implementation", "_attn_implementation_internal", "_flash_attn_2_enabled"),
        *("_experts_implementation", "experts_implementation", "_experts_implementation_internal"),
        *("auto_map", "custom_pipelines", "custom_generate", "trust_remote_code", "allow_all_kernels"),
        *("use_kernels", "kernel_config", "fusion_config", "distributed_config"),
        *("configuration_files", "transformers_weights", "extra_files", "gguf_file", "adapter_kwargs"),
        *("name_or_path", "_name_or_path", "_commit_hash", "use_pretrained_backbone"),
    )
)
"""Keys that name code, kernels, or other files and places; no computation here depends on them."""

_FETCHING = frozenset(("eetq", "metal", "nvfp4", "fbgemm_fp8", "mxfp4", "fp8", "mxfp8", "gguf"))
"""Quantisations whose kernels transformers fetches from the hub and runs."""

_SIZES: Mapping[str, int] = {
    "hidden_size": 1 << 20,
    "intermediate_size": 1 << 24,
    "num_hidden_layers": 4096,
    "num_attention_heads": 1 << 16,
    "num_key_value_heads": 1 << 16,
    "head_dim": 1 << 14,
    "vocab_size": 1 << 24,
    "max_position_embeddings": 1 << 30,
}
"""Sizes of a model, each with its maximum: at least ten times that of any model."""


_POINTER = b"version https://git-lfs"
"""First bytes of a pointer to a file that git-lfs has not fetched."""


def refuse_pointer(file: Path) -> None:
    """Refuse a file that is only a pointer of git-lfs.

    Raises
    ------
    ModelError
        The message says how to fetch it.
    """
    with file.open("rb") as opened:
        if opened.read(len(_POINTER)) == _POINTER:
            raise ModelError(
                f"{file} is a git-lfs pointer, not the file itself: run 'git lfs pull' in {file.parent}, or download "
                "the model with 'hf download'"
            )


def read_json(file: Path, limit: int = LARGEST_JSON) -> dict[str, Any]:
    """Read a JSON object of a model's folder.

    Raises
    ------
    ModelError
        When it is not a file or not a JSON object, or is larger than ``limit`` bytes or nested deeper than
        :data:`DEEPEST`.
    """
    try:
        if not file.is_file():
            raise ModelError(f"{file} is not a file: give a folder saved by save_pretrained")
        if (size := file.stat().st_size) > limit:
            raise ModelError(f"{file} has {size} bytes, more than {limit}: it cannot be such a file")
        refuse_pointer(file)
        read = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{file} cannot be read as JSON, download the model again: {in_words(error):.200}") from error
    if not isinstance(read, dict):
        raise ModelError(f"{file} holds a {type(read).__name__}, not a JSON object: download the model again")
    if _depth(read) > DEEPEST:
        raise ModelError(f"{file} is nested deeper than {DEEPEST} levels, as no model's is: download the model again")
    return read


def safe_config(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A model's configuration without keys that would run code or fetch something.

    Parameters
    ----------
    config
        ``config.json``, as :func:`read_json` reads it.
    name
        The model's name in messages.

    Raises
    ------
    ModelError
        When it does not name a model type, or is quantised in a way that needs kernels from the hub.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str) or not kind:
        raise ModelError(
            f"config.json of model {name!r} has the model_type {kind!r:.100}: it must name a kind of model"
        )
    for part in _objects(config):
        if (quantised := part.get("quantization_config")) is not None:
            _check_quantisation(quantised, name)
    return {key: _without_dropped(value) for key, value in config.items() if key not in _DROPPED}


def check_sizes(config: Any, name: str) -> None:
    """Refuse a configuration with impossible sizes.

    Parameters
    ----------
    config
        The text part of a transformers configuration.
    name
        The model's name in messages.

    Raises
    ------
    ModelError
        The message names the size.
    """
    from transformers import PreTrainedConfig

    if not isinstance(config, PreTrainedConfig):
        raise ModelError(f"config.json of model {name!r} has parts that no model of its type has: download it again")
    for key, largest in _SIZES.items():
        for value in layer_values(config, key):
            whole = isinstance(value, int) and not isinstance(value, bool)
            if value is not None and not (whole and 1 <= value <= largest):
                raise ModelError(
                    f"config.json of model {name!r} has {key}={value!r:.100}, but must have a whole number from 1 to "
                    f"{largest}: download the model again"
                )
    for layer in layers_of(config):
        heads, kv_heads = (getattr(layer, key, None) for key in ("num_attention_heads", "num_key_value_heads"))
        if heads and kv_heads and heads % kv_heads:
            raise ModelError(
                f"config.json of model {name!r} has {heads} heads for {kv_heads} kv heads, but needs a multiple of "
                "them: download the model again"
            )


def check_tokenizer(folder: Path) -> None:
    """Refuse tokenizer files that are not files, and chat templates that are too long.

    Raises
    ------
    ModelError
        The message names the file.
    """
    if (file := folder / "tokenizer_config.json").exists():
        template = read_json(file).get("chat_template")
        if len(json.dumps(template)) > LARGEST_TEMPLATE:
            raise ModelError(f"the chat template in {file} is longer than {LARGEST_TEMPLATE} bytes")
    for file in (
        *folder.glob("*token*"),
        *folder.glob("vocab*"),
        *folder.glob("*.jinja"),
        *folder.glob("*templates/*"),
    ):
        if not file.is_file() and not file.is_dir():
            raise ModelError(f"{file} is not a file: download the model again")
        if file.suffix == ".jinja" and file.stat().st_size > LARGEST_TEMPLATE:
            raise ModelError(f"the chat template {file} is longer than {LARGEST_TEMPLATE} bytes")
        if file.is_file():
            refuse_pointer(file)


def _check_quantisation(quantised: Any, name: str) -> None:
    """Refuse quantised weights that transformers does not dequantise, or computes with kernels that it fetches."""
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    if not isinstance(quantised, Mapping) or not isinstance(quantised.get("quant_method", ""), str):
        raise ModelError(f"the quantization_config of model {name!r} is {quantised!r:.100}: it must be an object")
    method = quantised.get("quant_method", "")
    if method in _FETCHING:
        raise ModelError(
            f"model {name!r} is quantised with {method}, whose kernels would be fetched from the hub and run: choose a "
            "GGUF file, or weights that are not quantised"
        )
    bits = quantised.get("load_in_8bit") or quantised.get("load_in_4bit")
    if not bits and method not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        raise ModelError(
            f"model {name!r} is quantised with {method or 'an unnamed method'!r} (quant_method in its "
            "quantization_config), which transformers does not know: it would compute without the scales. Choose a "
            "GGUF file, or weights that are not quantised"
        )


def _without_dropped(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_dropped(one) for key, one in value.items() if key not in _DROPPED}
    return [_without_dropped(one) for one in value] if isinstance(value, list) else value


def _objects(value: Any) -> Iterator[Mapping[str, Any]]:
    if isinstance(value, Mapping):
        yield value
    if isinstance(value, Mapping | list):
        for one in value.values() if isinstance(value, Mapping) else value:
            yield from _objects(one)


def _depth(value: Any) -> int:
    depth, level = 0, [value]
    while level:
        depth += 1
        level = [
            one
            for outer in level
            if isinstance(outer, dict | list)
            for one in (outer.values() if isinstance(outer, dict) else outer)
        ]
    return depth
