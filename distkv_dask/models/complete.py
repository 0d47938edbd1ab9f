"""Every weight of a model is in its checkpoint, and every tensor of the checkpoint is used.

Transformers initialises missing weights at random and ignores unknown tensors, with only a warning. Both are refused
here by name: an unknown tensor is a scale, an expert or a bias that would be left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from distkv_dask.errors import ModelError

_SHOWN = 3
"""Number of tensors that a message names."""

_OTHER_PARTS = re.compile(
    r"(^|[._])(vision|visual|images?|img|audio|speech|video|multi_?modal|mm)([._]|\d)"  # towers beside the text model
    r"|(^|\.)(mtp|nextn)([._]|\d)"  # layers that predict further tokens
)
"""Parts of a checkpoint that a text model leaves out."""


def check_complete(found: Mapping[str, Any], config: Any, name: str) -> None:
    """Refuse a model with a missing weight, a weight of another size, or an unused tensor in its checkpoint.

    Parameters
    ----------
    found
        Loading information of transformers (``output_loading_info``), without the keys that its model classes ignore.
    config
        The text part of the model's configuration.
    name
        The model's name in messages.

    Raises
    ------
    ModelError
        The message names tensors.
    """
    if missing := sorted(found["missing_keys"]):
        raise ModelError(
            f"the files of model {name!r} lack weights, which would be drawn at random: {_named(missing)}. Download "
            "them again, all parts of them"
        )
    if wrong := sorted(
        f"{key} is {tuple(held)}, not {tuple(needed)}" for key, held, needed in found["mismatched_keys"]
    ):
        raise ModelError(
            f"weights of model {name!r} have other sizes than its configuration says: {_named(wrong)}. Its config.json "
            "belongs to another model: download it again"
        )
    further = [f"layers.{config.num_hidden_layers + at}." for at in range(_further_layers(config))]
    unused = sorted(
        key
        for key in found["unexpected_keys"]
        if not beside_the_text_model(key) and not any(layer in key for layer in further)
    )
    if unused:
        raise ModelError(
            f"the files of model {name!r} hold tensors that model type {config.model_type!r} of transformers does not "
            f"use: {_named(unused)}. Without them its answers would be wrong: choose weights that are not quantised "
            "(scales are the usual cause), or save the model again with transformers' save_pretrained"
        )


def beside_the_text_model(key: str) -> bool:
    """Whether a tensor belongs to a part of a checkpoint that a text model leaves out."""
    return _OTHER_PARTS.search(key) is not None


def _further_layers(config: Any) -> int:
    """Layers after the last one that predict further tokens; their numbers continue."""
    return int(getattr(config, "num_nextn_predict_layers", None) or 0)


def _named(keys: Iterable[str]) -> str:
    first = list(keys)
    more = f" and {len(first) - _SHOWN} others" if len(first) > _SHOWN else ""
    return ", ".join(first[:_SHOWN]) + more
