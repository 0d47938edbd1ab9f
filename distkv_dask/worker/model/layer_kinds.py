"""What each layer of a model sees, inferred from the masks that the model requests from transformers.

Configurations express it in many ways, or not at all. A model's code always requests a mask, by a function of two
positions that returns whether one sees the other. Here that function is called instead of being turned into a tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn, cast

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from distkv_dask.errors import UnsupportedModelError
from distkv_dask.geometry import Geometry, LayerKind
from distkv_dask.models.support import max_positions
from distkv_dask.worker.model.hook import attending_with, running_step
from distkv_dask.worker.model.recurrent import attending_layers, has_recurrent_layers

_LOOKING = "distkv-look"
_TOKENS = 4
_NUMBERS = 8
"""Kernels need a multiple of this as head size."""

MaskFunction = Callable[[int, int, Tensor, Tensor], Tensor]


class Layer(NamedTuple):
    """How one layer calls its attention: number (-1 where several share weights), module, what it sees, and sizes."""

    number: int
    module: torch.nn.Module
    kind: LayerKind
    heads: int
    kv_heads: int
    d: int
    dv: int


def look_at_layers(model: Any) -> list[Layer]:
    """Run a model over a few tokens and return how its layers attend, in order.

    The model is left with another attention implementation.

    Raises
    ------
    UnsupportedModelError
        When a layer has its own mask or bias, or one that is neither a window nor a chunk.
    """
    look = _Look(model.config.get_text_config())
    model.set_attn_implementation(_LOOKING)
    positions = torch.arange(_TOKENS, device=model.device)
    with torch.inference_mode(), attending_with(cast(Any, look), positions, cast(Any, None)):
        # not a number: with one, Gemma 4 computes only some tokens in its last layers, with their own masks
        model(input_ids=positions[None], position_ids=positions[None], use_cache=False, logits_to_keep=positions)
    return look.layers


def kind_of(visible: MaskFunction, longest: int, device: torch.device | None = None) -> LayerKind | None:
    """Kind of the layers whose mask is ``visible(batch, head, query, key)``; None if it is not supported.

    Parameters
    ----------
    visible
        Returns, for broadcast int64 positions, whether the query sees the key.
    longest
        Longest sequence in tokens.
    device
        The device on which ``visible`` expects positions.

    Examples
    --------
    >>> kind_of(lambda batch, head, q, k: (k <= q) & (k > q - 5), 100)
    LayerKind(visible='sliding', size=5, soft_cap=None)
    """
    everywhere = torch.arange(longest, device=device)
    sees_start = visible(0, 0, everywhere, everywhere[0]).expand(longest)
    size = 0 if bool(sees_start.all()) else int(sees_start.int().argmin())
    kinds = [LayerKind("sliding", size), LayerKind("chunked", size)] if size else [LayerKind()]
    some = {
        0,
        1,
        size - 1,
        size,
        size + 1,
        2 * size - 1,
        2 * size,
        3 * size + 1,
        longest // 2,
        longest - 2,
        longest - 1,
    }
    for at in some:
        if 0 <= at < longest:
            row = visible(0, 0, everywhere[at], everywhere).expand(longest)
            kinds = [one for one in kinds if torch.equal(row, (everywhere >= one.first(at)) & (everywhere <= at))]
    return kinds[0] if kinds else None


def geometry_of(layers: Sequence[Layer], config: Any, dtype: str, latent: bool) -> Geometry:
    """Sizes of the pool that serves layers: the largest of all, and heads of a multiple of 8 numbers.

    Raises
    ------
    UnsupportedModelError
        When layers differ in their query heads, attend twice or not at all, or their KV heads have no common multiple.
    """
    _check_all_attend([layer.number for layer in layers], config)
    kv_heads = max(layer.kv_heads for layer in layers)
    if len({layer.heads for layer in layers}) > 1 or any(kv_heads % layer.kv_heads for layer in layers):
        _refuse(config, f"its layers differ in (heads, kv heads): {sorted({layer[3:5] for layer in layers})}")
    kinds = tuple(layer.kind for layer in layers)
    largest = max(max(layer.d, layer.dv) for layer in layers)
    return Geometry(
        layers=len(layers),
        heads=layers[0].heads,
        kv_heads=kv_heads,
        head_dim=-(-largest // _NUMBERS) * _NUMBERS,
        vocab_size=config.vocab_size,
        max_positions=max_positions(config),
        dtype=dtype,
        layer_kinds=() if set(kinds) == {LayerKind()} else kinds,
        latent_dim=max(layer.dv for layer in layers) if latent else 0,
    )


def _check_all_attend(indices: Sequence[int], config: Any) -> None:
    """Refuse a model unless all expected layers attend, given the indices of those that do."""
    if not has_recurrent_layers(config):
        expected = config.num_hidden_layers
        right = list(indices) == list(range(expected))
    else:  # layers that share their attention's weights have no index
        expected = attending_layers(config)
        right = len(indices) == expected > 0
    if not right:
        _refuse(
            config,
            f"{expected} of its {config.num_hidden_layers} layers (configuration key num_hidden_layers) should each "
            f"attend once through transformers' attention registry, in order, but layers {list(indices)} did",
        )


def _refuse(config: Any, reason: str) -> NoReturn:
    raise UnsupportedModelError(f"model type {config.model_type!r} cannot run with DistAttention: {reason}.")


class _Look:
    """Records how layers call their attention."""

    def __init__(self, config: Any) -> None:
        self.config = config
        self.layers: list[Layer] = []
        self.masks: list[tuple[Tensor, LayerKind | None]] = []
        """Masks that were returned, with their kinds."""

    def look(
        self, module: torch.nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, cap: float | None
    ) -> None:
        """Record a call, or refuse it."""
        number = getattr(module, "layer_idx", None)
        if number is None and not has_recurrent_layers(self.config):
            _refuse(self.config, "its attention modules do not know their layer (layer_idx)")
        kind: LayerKind | None = LayerKind()
        if mask is not None:
            kinds = [kind for given, kind in self.masks if given is mask]
            if not kinds:
                _refuse(self.config, "a layer has its own attention mask or position bias")
            kind = kinds[0]
        if kind is None:
            _refuse(self.config, "a layer's mask is neither causal, nor a sliding window, nor chunks")
        kind = LayerKind(kind.visible, kind.size, None if cap is None else float(cap))
        number = -1 if number is None else number
        self.layers.append(Layer(number, module, kind, q.shape[1], k.shape[1], k.shape[-1], v.shape[-1]))


def _mask(
    batch_size: int, q_length: int, kv_length: int, *, mask_function: MaskFunction, device: torch.device, **_: Any
) -> Tensor:
    look = cast(_Look, running_step())
    mask = torch.ones(batch_size, 1, q_length, kv_length, dtype=torch.bool, device=device)
    look.masks.append((mask, kind_of(mask_function, max_positions(look.config), device)))
    return mask


def _attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **keywords: Any
) -> tuple[Tensor, None]:
    cast(_Look, running_step()).look(module, query, key, value, attention_mask, keywords.get("softcap"))
    _, heads, tokens, _ = query.shape
    return query.new_zeros(1, tokens, heads, value.shape[-1]), None


AttentionInterface.register(_LOOKING, _attention)
AttentionMaskInterface.register(_LOOKING, cast(Any, _mask))
