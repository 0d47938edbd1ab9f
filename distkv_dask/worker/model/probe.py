"""A dry run of a loaded model, to verify that DistAttention equals the model's own attention.

A configuration does not tell everything. So two short sequences run through the model in two pieces, flattened into the
same calls, over plain dense attention; then each alone with the model's own attention; and the logits must agree. They
do so in float32, and in the first layers only, as many as have one of each kind. Sequences of a model with recurrent
layers run one by one and, for their last token, as rows of one call. Attention outside of transformers' registry,
sinks, and masks other than causal are found this way. Windows, which matter only over long distances, show in the masks
that the model requests (:mod:`.layer_kinds`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from distkv_dask.errors import UnsupportedModelError
from distkv_dask.geometry import Geometry, LayerKind
from distkv_dask.worker.model.first_layers import first_layers
from distkv_dask.worker.model.hook import IMPLEMENTATION, attending_with
from distkv_dask.worker.model.in_float32 import in_float32
from distkv_dask.worker.model.latent import absorb, can_absorb, sizes_of
from distkv_dask.worker.model.layer_kinds import geometry_of, look_at_layers
from distkv_dask.worker.model.recurrent import Past, State, has_recurrent_layers, state_bytes
from distkv_dask.worker.model.temperature import take_temperatures

_PIECES = ((3, 1), (2, 3))
"""Tokens that each of the two sequences adds in each of the two calls."""
_TOLERANCE, _LOW_PRECISION_TOLERANCE = 1e-3, 0.3
"""Largest relative difference of logits in float32, and if parts stay in 16 bits or fewer, whose rounding may send a
token to another expert."""


def probe(model: Any, latents: bool = True) -> Geometry:
    """Run ``model`` (a transformers causal LM) and return the geometry found in its layers.

    The model is left with the attention implementation ``"distkv"``, and its temperatures with our hook.

    Parameters
    ----------
    model
        A transformers causal LM.
    latents
        Whether latent attention may be computed over latents; then rounding depends on the number of tokens in a step.

    Raises
    ------
    UnsupportedModelError
        When a layer needs something that DistAttention does not compute, or the logits differ from the model's own.
    """
    config = model.config.get_text_config()
    total = [sum(tokens) for tokens in zip(*_PIECES, strict=True)]
    spread = torch.linspace(0, config.vocab_size - 1, sum(total)).long()
    ids = torch.split_with_sizes(spread.to(model.device), total)
    try:
        with torch.inference_mode():
            seen, dtype = look_at_layers(model), str(model.dtype).removeprefix("torch.")
            state = {}
            if has_recurrent_layers(config):
                model.set_attn_implementation(IMPLEMENTATION)
                state = _state_of(model, ids[0], geometry_of(seen, config, dtype, latent=False))
            if latent := latents and can_absorb([layer.module for layer in seen]):
                seen = [layer._replace(**sizes_of(layer.module)) for layer in seen]
            geometry = replace(geometry_of(seen, config, dtype, latent), **state)
            with first_layers(model, geometry) as layers, in_float32(model, layers) as exact:
                own, ours = _both(model, ids, geometry, [layer.module for layer in seen])
            model.set_attn_implementation(IMPLEMENTATION)
    except UnsupportedModelError:
        raise
    except Exception as error:  # a model's own code may raise any error
        raise UnsupportedModelError(
            f"model type {config.model_type!r} does not run on flattened tokens with DistAttention: {error}"
        ) from error
    _compare(config.model_type, own, ours, _TOLERANCE if exact else _LOW_PRECISION_TOLERANCE)
    return geometry


def _both(
    model: Any, ids: Sequence[Tensor], geometry: Geometry, attentions: Sequence[nn.Module]
) -> tuple[Tensor, Tensor]:
    """Logits by the model's own attention, and by ours, which all ``attentions`` keep."""
    model.set_attn_implementation("eager")
    own = torch.cat([_own_logits(model, tokens, bool(geometry.state_bytes)) for tokens in ids])
    take_temperatures(attentions)
    if geometry.latent_dim:
        absorb(attentions)
    model.set_attn_implementation(IMPLEMENTATION)
    if geometry.state_bytes:
        return own, _in_pieces_with_states(model, ids, geometry)
    return own, _in_pieces(model, ids, _Dense(geometry))


def _own_logits(model: Any, ids: Tensor, recurs: bool) -> Tensor:
    """Logits of a sequence with the model's own attention.

    The last token of a model with recurrent layers is a separate step, as when transformers generates: Zamba 2 has no
    least time step there.
    """
    positions = torch.arange(len(ids), device=ids.device)
    if not recurs:
        return _logits(model, ids, positions)
    cache, last = DynamicCache(config=model.config.get_text_config()), len(ids) - 1
    pieces = (slice(last), slice(last, None))
    return torch.cat([_logits(model, ids[piece], positions[piece], cache) for piece in pieces])


def _logits(model: Any, ids: Tensor, positions: Tensor, past: DynamicCache | None = None) -> Tensor:
    rows = past.rows if isinstance(past, Past) else 1
    output = model(
        input_ids=ids.view(rows, -1),
        position_ids=positions.view(rows, -1),
        past_key_values=past,
        use_cache=past is not None,
    )
    return cast(Tensor, output.logits.flatten(0, 1).float())


def _in_pieces(model: Any, ids: Sequence[Tensor], dense: _Dense) -> Tensor:
    """Return the logits of all tokens, sequence after sequence."""
    done = [0] * len(ids)
    logits: list[list[Tensor]] = [[] for _ in ids]
    for counts in _PIECES:
        pieces = [(start, start + count) for start, count in zip(done, counts, strict=True)]
        positions = torch.cat([torch.arange(*piece, device=ids[0].device) for piece in pieces])
        tokens = [sequence[slice(*piece)] for sequence, piece in zip(ids, pieces, strict=True)]
        dense.counts = counts
        with attending_with(dense, positions, dense.geometry):
            output = _logits(model, torch.cat(tokens), positions)
        for rows, part in zip(logits, torch.split_with_sizes(output, counts), strict=True):
            rows.append(part)
        done = [start + count for start, count in zip(done, counts, strict=True)]
    return torch.cat([part for rows in logits for part in rows])


def _state_of(model: Any, ids: Tensor, geometry: Geometry) -> dict[str, Any]:
    """Size of a model's state, and whether several tokens at once can continue from it."""
    config = model.config.get_text_config()
    logits = []
    for forget in (False, True):
        dense, past = _Dense(geometry), Past(config)
        _forward(model, dense, past, [(0, ids, 0, 2)])
        state = past.state(0)
        if forget:
            state = {slot: one if slot.convolution else torch.zeros_like(one) for slot, one in state.items()}
        logits.append(_forward(model, dense, Past(config, [state]), [(0, ids, 2, 4)]))
    recurs = any(not slot.convolution for slot in state)
    return {"state_bytes": state_bytes(state), "scan_once": recurs and torch.equal(*logits)}


def _in_pieces_with_states(model: Any, ids: Sequence[Tensor], geometry: Geometry) -> Tensor:
    """The same for a model with recurrent layers: pieces of one sequence at a time, then a last token of all."""
    config, dense = model.config.get_text_config(), _Dense(geometry)
    logits: list[list[Tensor]] = [[] for _ in ids]
    states: list[State] = [{} for _ in ids]
    size = 1 if geometry.scan_once else 2
    for sequence, tokens in enumerate(ids):
        for start in (0, *range(2, len(tokens) - 1, size)):
            past = Past(config, [states[sequence]])
            piece = sequence, tokens, start, min(start + (size if start else 2), len(tokens) - 1)
            logits[sequence].append(_forward(model, dense, past, [piece]))
            states[sequence] = past.state(0)
    last = [(at, tokens, len(tokens) - 1, len(tokens)) for at, tokens in enumerate(ids)]
    rows = _forward(model, dense, Past(config, states), last)
    return torch.cat([torch.cat([*some, row[None]]) for some, row in zip(logits, rows, strict=True)])


def _forward(model: Any, dense: _Dense, past: Past, pieces: Sequence[tuple[int, Tensor, int, int]]) -> Tensor:
    """Logits of pieces of sequences: the number of each sequence, its tokens, and the first and last of the piece."""
    sizes = {sequence: stop - start for sequence, _, start, stop in pieces}
    dense.counts = tuple(sizes.get(sequence, 0) for sequence in range(max(sizes) + 1))
    tokens = torch.cat([ids[start:stop] for _, ids, start, stop in pieces])
    positions = torch.cat([torch.arange(start, stop, device=tokens.device) for _, _, start, stop in pieces])
    with attending_with(dense, positions, dense.geometry):
        return _logits(model, tokens, positions, past)


def _compare(model_type: str, own: Tensor, ours: Tensor, tolerance: float) -> None:
    own, ours = (logits - logits.mean(-1, keepdim=True) for logits in (own, ours))
    error = float((own - ours).norm() / own.norm().clamp_min(1e-12))
    if not error <= tolerance:
        raise UnsupportedModelError(
            f"model type {model_type!r} does not compute the causal attention that its masks describe: with "
            f"DistAttention its logits differ from its own by {error:.2g} (relative; up to {tolerance:g} is rounding). "
            "Choose another model."
        )


class _Dense:
    """Plain dense attention of two sequences with separate KV.

    Attributes
    ----------
    counts
        New tokens of each sequence in the call under way.
    """

    def __init__(self, geometry: Geometry) -> None:
        self.geometry = geometry
        self.counts: tuple[int, ...] = ()
        self._kinds = geometry.layer_kinds or (LayerKind(),) * geometry.layers
        self._kv: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, sinks: Tensor | None = None) -> Tensor:
        """Attend in float32, each sequence by itself."""
        out, groups = [], q.shape[1] // k.shape[1]
        split = zip(*(torch.split_with_sizes(tensor, self.counts) for tensor in (q, k, v)), strict=True)
        for sequence, (queries, keys, values) in enumerate(split):
            if (layer, sequence) in self._kv:
                earlier = self._kv[layer, sequence]
                keys, values = torch.cat((earlier[0], keys)), torch.cat((earlier[1], values))
            self._kv[layer, sequence] = keys, values
            scores = torch.einsum("thd,shd->hts", queries.float(), keys.float().repeat_interleave(groups, 1)) * scale
            scores = self._hide(scores, self._kinds[layer])
            if sinks is not None:
                scores = torch.cat((scores, sinks.float()[:, None, None].expand(-1, len(queries), 1)), -1)
            weights = scores.softmax(-1)[..., : len(keys)]
            out.append(torch.einsum("hts,shd->thd", weights, values.float().repeat_interleave(groups, 1)))
        return torch.cat(out).to(q.dtype)

    @staticmethod
    def _hide(scores: Tensor, kind: LayerKind) -> Tensor:
        """Cap scores [heads, queries, keys], and hide the keys that a query does not see."""
        if kind.soft_cap is not None:
            scores = kind.soft_cap * torch.tanh(scores / kind.soft_cap)
        _, queries, keys = scores.shape
        positions = torch.arange(keys, device=scores.device)
        mine = positions[keys - queries :, None]
        return scores.masked_fill((positions > mine) | (positions < kind.first(mine)), float("-inf"))
