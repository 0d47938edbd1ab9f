"""The class of transformers that computes a model, and whether DistAttention can take the place of its attention."""

from __future__ import annotations

from typing import Any

from distkv_dask.errors import UnsupportedModelError


def check_class(config: Any, name: str) -> None:
    """Refuse a model whose class is no causal language model, or computes attention in code of its own.

    Parameters
    ----------
    config
        A transformers configuration.
    name
        What messages call the model.

    Raises
    ------
    UnsupportedModelError
        Saying which of the two.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, __version__

    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UnsupportedModelError(
            f"model {name!r} of type {config.model_type!r} is no causal language model of transformers {__version__}: "
            "choose one that generates text from text"
        )
    found: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if not (found._supports_attention_backend or found._can_set_attn_implementation()):
        raise UnsupportedModelError(
            f"model {name!r} of type {config.model_type!r} computes attention in code of its own ({found.__name__}), "
            "not through transformers' attention interface, where DistAttention takes its place: choose a newer model"
        )
