"""The files of an adapter, checked before anything starts, without torch and peft.

An adapter is LoRA of linear layers, as peft saves it. Other features of peft (DoRA, whole modules, embeddings, new
tokens) are refused by name, because leaving them out would give wrong answers.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from distkv_dask.adapter import Adapter
from distkv_dask.errors import AdapterError, MissingProgramError, ModelError, in_words
from distkv_dask.models.files import read_json, refuse_pointer

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

_COMPUTED = frozenset(
    (
        *("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"),
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    )
)
"""Keys that determine the computation; peft itself reads them on the workers."""

_WITHOUT_EFFECT = frozenset(
    (
        *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
        *("inference_mode", "lora_dropout", "fan_in_fan_out", "init_lora_weights", "eva_config", "runtime_config"),
        *("megatron_core", "qalora_group_size", "ensure_weight_tying"),
    )
)
"""Keys that change nothing if an adapter is not merged, or that are checked separately."""

_NAMES = {
    "use_dora": "DoRA",
    "modules_to_save": "whole modules that were trained",
    "trainable_token_indices": "tokens whose embeddings were trained",
    "bias": "biases that were trained",
    "lora_bias": "biases of its own",
    "target_parameters": "parameters outside of linear layers, such as experts",
    "layer_replication": "layers that are repeated",
    "alora_invocation_tokens": "tokens from which on it applies (aLoRA)",
}
"""Unsupported features, in words."""

_INITIAL = (True, False, None, "gaussian", "orthogonal", "eva")
"""Initialisations that do not change the model's own weights."""

_TENSOR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<part>[AB])\.weight")
_FLOATS = "F32", "F16", "BF16"


def read_adapter(place: str | os.PathLike[str]) -> Adapter:
    """Check the files of an adapter, and compute its fingerprint.

    Parameters
    ----------
    place
        Its folder.

    Raises
    ------
    MissingProgramError
        When peft is not installed.
    AdapterError
        When the folder has no complete adapter, or one that is not only LoRA of linear layers; the message says what.
    """
    if find_spec("peft") is None:
        raise MissingProgramError("adapters need peft: pip install 'distkv-dask[lora]'")
    folder = Path(os.path.abspath(os.path.expanduser(place)))
    stamps: list[int] = []
    for name in (CONFIG, WEIGHTS):
        try:
            stat = (folder / name).stat()
        except (OSError, ValueError) as error:
            raise AdapterError(_missing(folder, name)) from error
        stamps += stat.st_mtime_ns, stat.st_size, stat.st_ino
    return _read(folder, tuple(stamps))


@lru_cache(maxsize=256)
def _read(folder: Path, stamps: tuple[int, ...]) -> Adapter:
    """What :func:`read_adapter` returns, for files with these stamps."""
    try:
        check_config(read_json(folder / CONFIG), str(folder))
        refuse_pointer(folder / WEIGHTS)
    except ModelError as error:
        raise AdapterError(str(error)) from error
    adapter_shapes(folder)
    try:
        return Adapter(str(folder), fingerprint_of((folder / name).read_bytes() for name in (CONFIG, WEIGHTS)))
    except OSError as error:
        raise AdapterError(f"the adapter in {folder} cannot be read: {in_words(error)}") from error


def fingerprint_of(contents: Iterator[bytes]) -> str:
    """The fingerprint of an adapter, by the contents of its configuration and its weights."""
    digest = hashlib.sha256()
    for content in contents:
        digest.update(hashlib.sha256(content).digest())
    return digest.hexdigest()


def check_config(config: Mapping[str, Any], folder: str) -> None:
    """Refuse an adapter with unsupported features.

    Parameters
    ----------
    config
        As ``adapter_config.json`` has it.
    folder
        The adapter's name in messages.

    Raises
    ------
    AdapterError
        The message names the unsupported feature.
    """
    if (kind := config.get("peft_type")) != "LORA":
        raise AdapterError(f"the adapter in {folder} is of peft_type {kind!r:.50}, but only LORA is computed")
    if (task := config.get("task_type")) not in (None, "CAUSAL_LM"):
        raise AdapterError(f"the adapter in {folder} is for the task {task!r:.50}, but must be for CAUSAL_LM")
    if (initial := config.get("init_lora_weights")) not in _INITIAL:
        raise AdapterError(
            f"the adapter in {folder} began with init_lora_weights={initial!r:.50}, which changes the model's own "
            "weights: convert it (peft's path_initial_model_for_weight_conversion)"
        )
    rank = config.get("r")
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise AdapterError(f"the adapter in {folder} has the rank r={rank!r:.50}, but must have a whole number above 0")
    for key, value in config.items():
        if key in _COMPUTED or key in _WITHOUT_EFFECT or not value or (key == "bias" and value == "none"):
            continue
        raise AdapterError(
            f"the adapter in {folder} has {_NAMES.get(key, 'a setting that is not computed here')} "
            f"({key}={value!r:.100}); only LoRA of linear layers is computed: merge it into the model "
            "(peft's merge_and_unload), and open an engine on the result"
        )


def adapter_shapes(folder: Path) -> dict[str, tuple[int, int, int]]:
    """The modules that an adapter's weights are for: input size, rank and output size of each.

    Raises
    ------
    AdapterError
        When its file is damaged, or has tensors other than pairs of LoRA.
    """
    from safetensors import safe_open

    parts: dict[str, dict[str, list[int]]] = {}
    try:
        with safe_open(folder / WEIGHTS, framework="np") as opened:
            names = list(opened.keys())
            found = {name: opened.get_slice(name) for name in names}
            kinds = {name: (one.get_shape(), one.get_dtype()) for name, one in found.items()}
    except Exception as error:  # safetensors' own error derives from no other
        raise AdapterError(f"{folder / WEIGHTS} is damaged or cut short, save it again: {error}") from error
    for name, (shape, dtype) in kinds.items():
        match = _TENSOR.fullmatch(name)
        if match is None or len(shape) != 2 or dtype not in _FLOATS:
            raise AdapterError(
                f"the adapter in {folder} has the tensor {name:.200} ({dtype}, {shape}), but only lora_A and lora_B of "
                "linear layers are computed, in float32, float16 or bfloat16: merge it into the model (peft's "
                "merge_and_unload), and open an engine on the result"
            )
        parts.setdefault(match["module"], {})[match["part"]] = shape
    if not parts:
        raise AdapterError(f"{folder / WEIGHTS} holds no weights: save the adapter again")
    for module, pair in parts.items():
        if pair.keys() != {"A", "B"} or pair["A"][0] != pair["B"][1]:
            raise AdapterError(f"{folder / WEIGHTS} has no pair of weights for {module:.200}: save the adapter again")
    return {module: (pair["A"][1], pair["A"][0], pair["B"][0]) for module, pair in parts.items()}


def _missing(folder: Path, name: str) -> str:
    if (folder / "adapter_model.bin").exists() and name == WEIGHTS:
        return (
            f"the weights in {folder} are pickled (adapter_model.bin), and reading a pickle can run code: save the "
            "adapter again where you trust it (peft's save_pretrained writes safetensors)"
        )
    return (
        f"there is no adapter in {folder}: it has no file {name} that can be read. Give the path of a folder saved by "
        "peft's save_pretrained, which the client and all workers reach"
    )
