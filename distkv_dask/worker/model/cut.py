"""A model cut down to the layers of a stage: other layers stay in the list as modules that compute nothing.

The model's own forward runs at every stage, so that everything it derives from positions is available. At the home, the
first layer of the next stage sends hidden states through all further stages and returns the reply; at a stage, the
layer before its own returns the hidden states that it received.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from distkv_dask.errors import UnsupportedModelError, in_words
from distkv_dask.geometry import Geometry
from distkv_dask.placement import Stage
from distkv_dask.worker.model.first_layers import first_layers
from distkv_dask.worker.model.from_disk import layers_of
from distkv_dask.worker.model.hook import attending_with, running_step
from distkv_dask.worker.model.in_float32 import in_float32

_TOLERANCE = 1e-3
"""Largest relative difference between a model in two stages and the whole one: rounding of parts in 16 bits."""

_ADVICE = "Set distkv.stages to 1, or choose another model"

_here = threading.local()
"""Hidden states that the stage whose forward runs on this thread received, and those that it sends."""


class Elsewhere(nn.Module):
    """Replaces a layer that another worker computes.

    Parameters
    ----------
    layer
        The layer, whose plain attributes some models read.
    sends
        Whether it sends hidden states through all further stages.
    """

    def __init__(self, layer: nn.Module, sends: bool = False) -> None:
        super().__init__()
        for name, value in vars(layer).items():
            if isinstance(value, str | int | float | None) and not name.startswith("_"):
                setattr(self, name, value)
        self.sends = sends

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        """Hidden states [1, T, size] after all stages; unchanged in a forward without stages."""
        further = getattr(running_step(), "further", None) if self.sends else None
        return hidden_states if further is None else cast(Tensor, further.through(hidden_states))


class _Entry(Elsewhere):
    """The layer before a stage's own."""

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        """Hidden states from the home."""
        return cast(Tensor, _here.came)


def keep_layers(model: Any, geometry: Geometry, stage: Stage) -> Geometry:
    """Cut a model down to the layers of a stage; returns the geometry of these.

    Parameters
    ----------
    model
        A transformers model, changed in place.
    geometry
        Its sizes.
    stage
        The stage. The first one keeps what is outside of layers.

    Raises
    ------
    UnsupportedModelError
        The model has fewer layers than stages, or cannot be cut between layers.
    """
    layers = layers_of(model)
    if geometry.home_bytes or len(layers) != geometry.layers:
        raise UnsupportedModelError(
            f"distkv.stages is {stage.count}, but model type {model.config.model_type!r} has layers that keep a state "
            "or a window at the home of a sequence, which are on one worker: set distkv.stages to 1"
        )
    if len(layers) < stage.count:
        raise UnsupportedModelError(
            f"distkv.stages is {stage.count}, but the model has {len(layers)} layers: each stage needs one"
        )
    with first_layers(model, geometry) as few, in_float32(model, few):
        _check_cut(model, cast(nn.ModuleList, few), geometry)
    first, stop = stage.layers(len(layers))
    for at, layer in enumerate([*layers]):
        if stage.number and at == first - 1:
            layers[at] = _Entry(layer)
        elif not first <= at < stop:
            layers[at] = Elsewhere(layer, sends=not stage.number and at == stop)
    if stage.number:
        layers[stop - 1].register_forward_hook(_leave)
        model.set_output_embeddings(None)
        model.get_decoder().set_input_embeddings(None)
    return replace(geometry, layers=stop - first, layer_kinds=geometry.layer_kinds[first:stop])


def stage_forward(model: Any, hidden: Tensor, positions: Tensor) -> Tensor:
    """Hidden states [T, size] after a stage's layers, computed from those before it.

    Parameters
    ----------
    model
        Cut down by :func:`keep_layers`.
    hidden
        [T, size] of flattened tokens, in the model's dtype.
    positions
        int64 [T].
    """
    with torch.inference_mode(), _coming(hidden[None]):
        model.get_decoder()(inputs_embeds=hidden[None], position_ids=positions[None], use_cache=False)
        return cast(Tensor, _here.left[0])


@contextmanager
def _coming(hidden: Tensor) -> Iterator[None]:
    _here.came = hidden
    try:
        yield
    finally:
        _here.came = None


def _leave(layer: nn.Module, given: Any, output: Tensor) -> None:
    _here.left = output


class _OwnToken:
    """Attention in which each token sees itself alone."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, sinks: Tensor | None = None) -> Tensor:
        """The token's own values, for every head."""
        return v.repeat_interleave(q.shape[1] // v.shape[1], 1)


def _check_cut(model: Any, few: nn.ModuleList, geometry: Geometry) -> None:
    """Refuse a model unless hidden states, and only these, go from layer to layer."""
    config, after = model.config.get_text_config(), list[Any]()
    ids = torch.linspace(0, config.vocab_size - 1, 5).long()[None]
    first = few[0]
    hook = first.register_forward_hook(lambda *call: after.append(call[2]))
    try:
        own = _logits(model, geometry, input_ids=ids)
        hook.remove()
        few[0] = _Entry(first)
        with _coming(after[0].clone()):
            ours = _logits(model, geometry, inputs_embeds=after[0])
    except Exception as error:  # a model's own code may raise any error
        raise UnsupportedModelError(f"{_uncut(config)}: {in_words(error)}. {_ADVICE}") from error
    difference = float((own - ours).norm() / own.norm().clamp_min(1e-12))
    if not difference <= _TOLERANCE:
        raise UnsupportedModelError(f"{_uncut(config)}: its logits then differ by {difference:.2g}. {_ADVICE}")


def _logits(model: Any, geometry: Geometry, **inputs: Tensor) -> Tensor:
    positions = torch.arange(5)
    with torch.inference_mode(), attending_with(_OwnToken(), positions, geometry):
        return cast(Tensor, model(**inputs, position_ids=positions[None], use_cache=False).logits.float())


def _uncut(config: Any) -> str:
    return f"layers of model type {config.model_type!r} cannot be on several workers"
