"""Decoder layers of Llama's form, computed by the C++ core where its products serve their linears.

What a layer computes is told from its code: where that of all its modules is, byte for byte, what transformers' Llama,
Mistral, Qwen2 or Qwen3 has, only sizes, weights and epsilons differ. All other layers stay transformers' own.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from types import CodeType
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.models.llama import modeling_llama as llama
from transformers.models.mistral.modeling_mistral import MistralAttention
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

from distkv_dask.kernels.decoder_layer import DecoderLayer, Norm, Parts, is_served
from distkv_dask.kernels.few_rows import FewRows
from distkv_dask.worker.model.hook import attend_rows, fits
from distkv_dask.worker.model.packed import FewRowsLinear

Embeddings = tuple[Tensor, Tensor]
"""Cosines and sines [1, T, head_dim] of positions."""
PLAIN = (llama.LlamaAttention, MistralAttention, Qwen2Attention)
"""Attention that differs in nothing but windows, which the step knows."""
NORMED = (Qwen3Attention,)
"""Attention with norms of queries and keys."""
_HOOKS = "_forward_hooks", "_forward_pre_hooks"
"""Where torch keeps who watches a module."""
ROTARY = ("apply_rotary_pos_emb", "rotate_half")
"""Functions that attention calls."""


def use_core(model: nn.Module) -> int:
    """Let the core compute the layers that it can; returns how many.

    Parameters
    ----------
    model
        A model whose linears are packed (:mod:`.packed`).
    """
    made = 0
    for layer in [*model.modules()]:
        parts = _parts(layer) if _has_form(layer) else None
        if parts is not None:
            layer.forward = CoreLayer(layer, parts)
            made += 1
    return made


class CoreLayer:
    """The forward of a decoder layer.

    Parameters
    ----------
    layer
        Serves more rows than the core does, and calls for which the core is not made.
    parts
        Its parts.
    """

    def __init__(self, layer: Any, parts: Parts) -> None:
        self._layer = weakref.ref(layer)  # which has this object
        self._core = core = DecoderLayer(parts)
        self._scale: float = layer.self_attn.scaling
        self._form = core.kv_heads, core.head_dim
        # adapters and others watch modules, which would not be called
        modules = [module for module in layer.modules() if module is not layer]
        self._watchers = [vars(one)[hooks] for one in modules for hooks in _HOOKS]

    def __call__(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = False,
        position_embeddings: Embeddings | None = None,
        **others: Any,
    ) -> Tensor:
        """Hidden states [1, T, size] after the layer; parameters are those of transformers' decoder layers."""
        core = self._core
        if past_key_values is not None or any(self._watchers) or not self._takes(hidden_states, position_embeddings):
            given = (attention_mask, position_ids, past_key_values, use_cache, position_embeddings)
            layer: Any = self._layer()
            plain: Tensor = type(layer).forward(layer, hidden_states, *given, **others)
            return plain
        hidden = hidden_states[0].contiguous()
        cosines, sines = (one[0].contiguous() for one in cast(Embeddings, position_embeddings))
        attended = attend_rows(*core.before_attention(hidden, cosines, sines), self._scale)
        return core.after_attention(hidden, attended.to(hidden.dtype)).unsqueeze(0)

    def _takes(self, hidden: Tensor, embeddings: Embeddings | None) -> bool:
        """Whether hidden states and rotary embeddings have the shapes and the dtype that the core reads."""
        rows, (kv_heads, head_dim) = hidden.shape[1], self._form
        return (
            embeddings is not None
            and hidden.shape[0] == 1
            and 0 < rows <= self._core.most
            and all(one.shape == (1, rows, head_dim) and one.dtype == torch.bfloat16 for one in embeddings)
            and hidden.dtype == torch.bfloat16
            and fits(kv_heads, head_dim)
        )


def _has_form(layer: Any) -> bool:
    """Whether a layer's modules have the code that the core computes."""
    attention, mlp = getattr(layer, "self_attn", None), getattr(layer, "mlp", None)
    if attention is None or mlp is None or not _same(layer, llama.LlamaDecoderLayer):
        return False
    normed = any(_same(attention, one) for one in NORMED)
    norms = [layer.input_layernorm, layer.post_attention_layernorm]
    norms += [attention.q_norm, attention.k_norm] if normed else []
    return (
        (normed or any(_same(attention, one) for one in PLAIN))
        and all(_calls_the_same(attention, name) for name in ROTARY)
        and _same(mlp, llama.LlamaMLP)
        and type(mlp.act_fn) is type(ACT2FN["silu"])
        and all(_same(norm, llama.LlamaRMSNorm) for norm in norms)
    )


def _same(module: Any, other: type[nn.Module]) -> bool:
    """Whether a module's own forward has the code of another class's."""
    return "forward" not in vars(module) and _code(type(module).forward) == _code(other.forward)


def _calls_the_same(module: Any, function: str) -> bool:
    """Whether a global function that a module's forward uses has the code of Llama's."""
    found = inspect.unwrap(type(module).forward).__globals__.get(function)
    return found is not None and _code(found) == _code(getattr(llama, function))


def _code(function: Callable[..., Any]) -> tuple[object, ...]:
    code: CodeType = inspect.unwrap(function).__code__
    constants = tuple(one for one in code.co_consts if one != function.__doc__)
    return code.co_code, code.co_names, code.co_varnames, constants


def _parts(layer: Any) -> Parts | None:
    """Parts of a layer for the core; None if it does not take them."""
    attention, mlp = layer.self_attn, layer.mlp
    linears = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
    few = [*map(_few, (*linears, mlp.gate_proj, mlp.up_proj, mlp.down_proj))]
    if not all(few):
        return None
    heads = [_norm(getattr(attention, name, None)) for name in ("q_norm", "k_norm")]
    norms = [_norm(layer.input_layernorm), _norm(layer.post_attention_layernorm), *heads]
    made: list[Any] = [*few, *norms, attention.head_dim]
    parts = Parts(*made)
    return parts if is_served(parts) else None


def _few(linear: nn.Module) -> FewRows | None:
    forward = vars(linear).get("forward")
    return forward.few if isinstance(forward, FewRowsLinear) else None


def _norm(module: Any) -> Norm | None:
    return None if module is None else Norm(module.weight, module.variance_epsilon)
