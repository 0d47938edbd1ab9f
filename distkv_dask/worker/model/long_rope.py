"""LongRoPE (arXiv 2402.13753) pinned to the model's longest sequence.

Transformers switches a batch to other frequencies when it grows past the original length, so that stored keys become
wrong. Here all positions use the frequencies of long sequences from the first token on, as in vLLM.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

_LONG = "longrope"


def pin_long_rope(model: Any, longest: int) -> None:
    """Permanently give rotary embeddings of the kind ``longrope`` the frequencies of sequences of ``longest`` tokens.

    Parameters
    ----------
    model
        A transformers model; changed in place.
    longest
        Longest sequence in tokens. If the original length is not shorter, nothing changes.
    """
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        if isinstance(kinds, dict):
            for layer_type in [name for name, kind in kinds.items() if kind == _LONG]:
                _pin(module, module.config.rope_parameters[layer_type], longest, layer_type)
                module.rope_type = {**module.rope_type, layer_type: "default"}
        elif kinds == _LONG:
            _pin(module, module.config.rope_parameters, longest, None)
            module.rope_type = "default"


def _pin(module: Any, parameters: Any, longest: int, layer_type: str | None) -> None:
    original = int(parameters["original_max_position_embeddings"])
    if longest <= original:
        return
    buffer: torch.Tensor = getattr(module, "inv_freq" if layer_type is None else f"{layer_type}_inv_freq")
    frequencies, _ = ROPE_INIT_FUNCTIONS[_LONG](
        module.config, buffer.device, seq_len=original + 1, layer_type=layer_type
    )
    buffer.copy_(frequencies)
