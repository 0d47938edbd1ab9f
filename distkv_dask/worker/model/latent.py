"""Latent attention (MLA, arXiv 2405.04434) absorbed: latents are stored, not the keys and values of all heads.

A head's keys and values are linear in the latent. So its queries are projected into the space of latents, attention
is over latents, and the result is projected to the head's values: with ``q' = q W_UK`` and ``out = out' W_UV``, the
scores and results are the same. Keys are the latent and the part with positions; values are the latent alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

_ABSORBED = "distkv_absorbed"
_NUMBERS = 8
"""Kernels need a multiple of this as the number of a value's elements."""


def can_absorb(attentions: Sequence[Any]) -> bool:
    """Whether all of these attention modules can pass latents, like transformers' ``DeepseekV3Attention``."""
    return all(
        hasattr(module, "expand_kv")
        and type(getattr(module, "kv_b_proj", None)) is nn.Linear
        and module.kv_b_proj.bias is None
        and module.kv_lora_rank % _NUMBERS == 0
        for module in attentions
    )


def absorb(attentions: Sequence[Any]) -> None:
    """Let attention modules that can pass latents do so; they are changed in place."""
    for module in attentions:
        module.expand_kv = _latents
        setattr(module, _ABSORBED, True)


def sizes_of(module: Any) -> dict[str, Any]:
    """Sizes in an absorbed module: ``kv_heads``, and numbers of keys ``d`` and of values ``dv``."""
    return {"kv_heads": 1, "d": module.kv_lora_rank + module.qk_rope_head_dim, "dv": module.kv_lora_rank}


def is_absorbed(module: nn.Module) -> bool:
    """Whether an attention module passes latents."""
    return _ABSORBED in vars(module)  # looking for a missing attribute of a module is slow


def into_latents(module: Any, query: Tensor) -> Tensor:
    """Queries [b, heads, t, nope + rope] in the space of latents: [b, heads, t, rank + rope]."""
    nope = module.qk_nope_head_dim
    projected = query[..., :nope] @ _projections(module, query.dtype)[:, :nope]
    return torch.cat((projected, query[..., nope:]), dim=-1)


def out_of_latents(module: Any, out: Tensor) -> Tensor:
    """Results over latents, [t, heads, rank], as values of each head: [t, heads, dv]."""
    values = _projections(module, out.dtype)[:, module.qk_nope_head_dim :]
    return torch.einsum("thr,hvr->thv", out, values)


def _projections(module: Any, dtype: torch.dtype) -> Tensor:
    """Weights [heads, nope + dv, rank], of keys and then of values."""
    weight: Tensor = module.kv_b_proj.weight.to(dtype)  # of another dtype only while a model is probed
    return weight.view(-1, module.qk_nope_head_dim + module.v_head_dim, module.kv_lora_rank)


def _latents(latent: Tensor, rotated: Tensor) -> tuple[Tensor, Tensor]:
    """Replaces ``expand_kv``: keys [b, 1, t, rank + rope] and values [b, 1, t, rank]."""
    return torch.cat((latent, rotated), dim=-1), latent
