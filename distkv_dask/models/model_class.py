"""The class of transformers that computes a model, and whether DistAttention can replace its attention."""

from __future__ import annotations

from typing import Any

from distkv_dask.errors import UnsupportedModelError

# transformers has no public names for these
_SUPPORTS = "_supports_attention_backend"
_CAN_SET = "_can_set_attn_implementation"


def model_class(config: Any, name: str) -> Any:
    """The class that loads a model to continue text, with its other parts if its text part has no class of its own.

    Parameters
    ----------
    config
        A transformers configuration.
    name
        The model's name in messages.

    Raises
    ------
    UnsupportedModelError
        There is none, or it computes attention in its own code.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MULTIMODAL_LM_MAPPING, __version__

    mappings = MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MULTIMODAL_LM_MAPPING
    found: Any = next((mapping[type(config)] for mapping in mappings if type(config) in mapping), None)
    if found is None:
        raise UnsupportedModelError(
            f"model {name!r} of type {config.model_type!r} is not a causal language model of transformers "
            f"{__version__}: choose one that generates text from text"
        )
    if not (getattr(found, _SUPPORTS, False) or getattr(found, _CAN_SET)()):
        raise UnsupportedModelError(
            f"model {name!r} of type {config.model_type!r} computes attention in its own code ({found.__name__}), "
            "not through transformers' attention interface, which DistAttention replaces: choose a newer model"
        )
    return found
