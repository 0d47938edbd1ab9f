"""States of recurrent layers, from which a forward continues, in the form of transformers' caches.

Gated delta nets, state spaces and short convolutions keep a state of fixed size for all earlier tokens. Transformers
computes with it; this module puts it in and takes it out. Keys and values are not included: attention has them in the
pools.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import (
    DYNAMIC_LAYER_TYPE_MAPPING,
    DummyLayer,
    DynamicLayer,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
    get_layer_types_and_kwargs,
)


class Slot(NamedTuple):
    """A tensor of a state: layer of the model, whether it is a convolution's, and its number in the layer."""

    layer: int
    convolution: bool
    number: int


State = dict[Slot, Tensor]
"""State of one sequence after some token: tensors [1, ...], each in the dtype that its layer gave it."""


class Past(DynamicCache):
    """States of the sequences of a forward, which changes them in place.

    Parameters
    ----------
    config
        Configuration of the text model.
    states
        State of each sequence; a sequence without one is at its first token, and must be alone.
    """

    def __init__(self, config: Any, states: Sequence[State] = ({},)) -> None:
        super().__init__(config=config)
        self.rows = len(states)
        for slot in states[0]:
            self._put(slot, torch.cat([state[slot] for state in states]))

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Return keys and values unchanged: earlier ones are in the pools."""
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """0: positions are always given."""
        return 0

    @property
    def is_empty(self) -> bool:
        """Whether nothing was computed yet."""
        return next(self._filled(), None) is None

    def keep(self, rows: Sequence[int]) -> None:
        """Continue with some of the sequences, in this order."""
        for slot, tensor in list(self._filled()):
            self._put(slot, tensor[list(rows)])
        self.rows = len(rows)

    def state(self, row: int) -> State:
        """State of a sequence now: views, which later forwards change."""
        return {slot: tensor[row : row + 1] for slot, tensor in self._filled()}

    def _filled(self) -> Iterator[tuple[Slot, Tensor]]:
        for at, layer in enumerate(self.layers):
            if isinstance(layer, LinearAttentionCacheLayerMixin):
                for convolution, states in ((True, layer.conv_states), (False, layer.recurrent_states)):
                    for number, tensor in states.items():
                        if tensor is not None:
                            yield Slot(at, convolution, number), tensor

    def _put(self, slot: Slot, tensor: Tensor) -> None:
        layer: Any = self.layers[slot.layer]
        if slot.convolution:
            layer.dtype, layer.device = tensor.dtype, tensor.device
            layer.conv_states[slot.number], layer.conv_kernel_size[slot.number] = tensor, tensor.shape[-1]
            layer.is_conv_states_initialized[slot.number] = True
        else:
            layer.recurrent_states[slot.number] = tensor
            layer.is_recurrent_states_initialized[slot.number] = True
        layer.has_previous_state[slot.number] = True


def has_recurrent_layers(config: Any) -> bool:
    """Whether a model keeps a state in addition to its keys and values, by its configuration."""
    return any(issubclass(kind, LinearAttentionCacheLayerMixin) for kind in _cache_kinds(config))


def attending_layers(config: Any) -> int:
    """Number of attention layers of a model with recurrent ones, by its configuration."""
    return sum(kind is not LinearAttentionLayer and not issubclass(kind, DummyLayer) for kind in _cache_kinds(config))


def state_bytes(state: State) -> int:
    """Bytes of one sequence's state."""
    return sum(tensor.nbytes for tensor in state.values())


def _cache_kinds(config: Any) -> list[type]:
    """The cache of each layer, as transformers' class for it."""
    kinds, _ = get_layer_types_and_kwargs(config)
    return [DYNAMIC_LAYER_TYPE_MAPPING.get(kind, DynamicLayer) for kind in kinds]
