"""Models with other parts than text (vision, audio) as text models: which class loads them, and what is let go of."""

from __future__ import annotations

from typing import Any

from torch import nn


def loading_class(config: Any) -> Any:
    """Transformers' class that loads a model to complete text: with its other parts, where text has no class alone.

    Parameters
    ----------
    config
        The whole model's configuration.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, AutoModelForMultimodalLM

    causal = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or config.get_text_config() is config
    return AutoModelForCausalLM if causal else AutoModelForMultimodalLM


def drop_other_parts(model: Any) -> None:
    """Free what of a model is not for text; a model of one part stays as it is.

    Parameters
    ----------
    model
        A transformers model; changed in place.
    """
    if model.config.get_text_config() is model.config:
        return
    kept = {model.get_decoder(), model.get_input_embeddings(), model.get_output_embeddings()}
    for parent in (model, model.base_model):
        for name, child in [*parent.named_children()]:
            if parent not in kept and not _holds(child, kept):
                setattr(parent, name, None)


def _holds(module: nn.Module, some: set[nn.Module]) -> bool:
    return any(one in some for one in module.modules())
