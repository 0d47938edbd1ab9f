"""Models with parts other than text (vision, audio) as text models."""

from __future__ import annotations

from typing import Any

from torch import nn


def drop_other_parts(model: Any) -> None:
    """Free the parts of a model that are not for text, and drop masks of images; a text model is unchanged.

    Parameters
    ----------
    model
        A transformers model; changed in place.
    """
    text = model.config.get_text_config()
    if text is model.config:
        return
    if getattr(text, "use_bidirectional_attention", None) == "vision":
        text.use_bidirectional_attention = None  # there are no images, whose tokens would see each other
    kept = {model.get_decoder(), model.get_input_embeddings(), model.get_output_embeddings()}
    for parent in (model, model.base_model):
        for name, child in [*parent.named_children()]:
            if parent not in kept and not _holds(child, kept):
                setattr(parent, name, None)


def _holds(module: nn.Module, some: set[nn.Module]) -> bool:
    return any(one in some for one in module.modules())
