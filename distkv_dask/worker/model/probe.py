"""A dry run of a freshly loaded model, to see that DistAttention computes what the model's own attention computes.

A configuration does not tell everything. So two short sequences run through the model in two pieces, flattened into
the same calls, over plain dense attention; then each alone with the model's own attention; and the logits must agree.
Recurrent or convolution layers, attention outside of transformers' registry, sinks, and masks other than causal are
found this way. What matters only over long distances (windows) or for large scores (soft caps) shows in the keywords.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor
from transformers import AttentionInterface

from distkv_dask.errors import UnsupportedModelError
from distkv_dask.geometry import Geometry
from distkv_dask.models.support import max_positions, window_in_effect
from distkv_dask.worker.model.hook import IMPLEMENTATION, attending_with, dist_attention, running_step

_OBSERVING = "distkv-probe"
_PIECES = ((3, 1), (2, 3))
"""Tokens that each of the two sequences adds in each of the two calls."""
_TOLERANCE = {torch.float32: 1e-3}
_LOW_PRECISION_TOLERANCE = 0.3
"""Largest relative difference of logits. Loose in 16 bits, where rounding may send a token to another expert."""


def probe(model: Any) -> Geometry:
    """Run ``model`` (a transformers causal LM) and return the geometry that its layers showed.

    The model is left with the attention implementation ``"distkv"``.

    Raises
    ------
    UnsupportedModelError
        When a layer asks for what DistAttention does not compute, or the logits differ from the model's own.
    """
    config = model.config.get_text_config()
    total = [sum(tokens) for tokens in zip(*_PIECES, strict=True)]
    spread = torch.linspace(0, config.vocab_size - 1, sum(total)).long()
    ids = torch.split_with_sizes(spread.to(model.device), total)
    try:
        with torch.inference_mode():
            model.set_attn_implementation("eager")
            own = torch.cat([_logits(model, tokens, torch.arange(len(tokens), device=tokens.device)) for tokens in ids])
            model.set_attn_implementation(_OBSERVING)
            observer = _Observer(config)
            ours = _in_pieces(model, ids, observer)
            geometry = observer.geometry(str(model.dtype).removeprefix("torch."))
            model.set_attn_implementation(IMPLEMENTATION)
    except UnsupportedModelError:
        raise
    except Exception as error:  # a model's own code stumbles over its configuration in any way
        raise UnsupportedModelError(
            f"model type {config.model_type!r} does not run on flattened tokens with DistAttention: {error}"
        ) from error
    _compare(config.model_type, own, ours, _TOLERANCE.get(model.dtype, _LOW_PRECISION_TOLERANCE))
    return geometry


def _logits(model: Any, ids: Tensor, positions: Tensor) -> Tensor:
    output = model(input_ids=ids[None], position_ids=positions[None], use_cache=False)
    return cast(Tensor, output.logits[0].float())


def _in_pieces(model: Any, ids: Sequence[Tensor], observer: _Observer) -> Tensor:
    """Return the logits of all tokens, sequence after sequence."""
    done = [0] * len(ids)
    logits: list[list[Tensor]] = [[] for _ in ids]
    for counts in _PIECES:
        pieces = [(start, start + count) for start, count in zip(done, counts, strict=True)]
        positions = [torch.arange(*piece, device=ids[0].device) for piece in pieces]
        tokens = [sequence[slice(*piece)] for sequence, piece in zip(ids, pieces, strict=True)]
        with observer.forward(counts):
            output = _logits(model, torch.cat(tokens), torch.cat(positions))
        for rows, part in zip(logits, torch.split_with_sizes(output, counts), strict=True):
            rows.append(part)
        done = [start + count for start, count in zip(done, counts, strict=True)]
    return torch.cat([part for rows in logits for part in rows])


def _compare(model_type: str, own: Tensor, ours: Tensor, tolerance: float) -> None:
    own, ours = (logits - logits.mean(-1, keepdim=True) for logits in (own, ours))
    error = float((own - ours).norm() / own.norm().clamp_min(1e-12))
    if not error <= tolerance:
        raise UnsupportedModelError(
            f"model type {model_type!r} computes something other than causal attention over all earlier tokens: with "
            f"DistAttention its logits differ from its own by {error:.2g} (relative; up to {tolerance:g} is rounding). "
            "Choose another model."
        )


class _Observer:
    """Plain dense attention that also looks at how the layers call it."""

    def __init__(self, config: Any) -> None:
        self._config = config
        self._kv: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self._counts: tuple[int, ...] = ()
        self._calls: list[int] = []
        self._shapes: set[tuple[int, int, int]] = set()

    @contextmanager
    def forward(self, counts: tuple[int, ...]) -> Iterator[None]:
        """Observe one forward in which the sequences add ``counts`` tokens; every layer must attend once."""
        self._counts, self._calls = counts, []
        with attending_with(self):
            yield
        if self._calls != list(range(self._config.num_hidden_layers)):
            self._refuse(
                f"its {self._config.num_hidden_layers} layers (configuration key num_hidden_layers) should attend once "
                f"each through transformers' attention registry, in order, but layers {self._calls} did"
            )

    def look(self, module: torch.nn.Module, q: Tensor, k: Tensor, v: Tensor, keywords: Mapping[str, Any]) -> None:
        """Refuse keywords and shapes that DistAttention has no place for."""
        window = keywords.get("sliding_window")
        if isinstance(window, int) and window_in_effect(self._config, window):
            self._refuse(f"a layer asks for a sliding window of {window} tokens")
        for keyword, feature in (("softcap", "a soft cap on attention logits"), ("s_aux", "attention sinks")):
            if keywords.get(keyword) is not None:
                self._refuse(f"a layer asks for {feature} (keyword {keyword})")
        if keywords.get("attention_mask") is not None:
            self._refuse("a layer brings its own attention mask or position bias")
        if getattr(module, "layer_idx", None) is None:
            self._refuse("its attention modules do not know their layer (layer_idx)")
        if not q.shape[-1] == k.shape[-1] == v.shape[-1] or k.shape[1] != v.shape[1]:
            self._refuse(f"queries, keys and values differ in size: {q.shape[1:]}, {k.shape[1:]}, {v.shape[1:]}")
        self._shapes.add((q.shape[1], k.shape[1], q.shape[3]))

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Attend in float32, each sequence by itself."""
        self._calls.append(layer)
        out, groups = [], q.shape[1] // k.shape[1]
        split = zip(*(torch.split_with_sizes(tensor, self._counts) for tensor in (q, k, v)), strict=True)
        for sequence, (queries, keys, values) in enumerate(split):
            if (layer, sequence) in self._kv:
                earlier = self._kv[layer, sequence]
                keys, values = torch.cat((earlier[0], keys)), torch.cat((earlier[1], values))
            self._kv[layer, sequence] = keys, values
            hidden = torch.ones(len(queries), len(keys), dtype=torch.bool, device=q.device).triu(
                len(keys) - len(queries) + 1
            )
            scores = torch.einsum("thd,shd->hts", queries.float(), keys.float().repeat_interleave(groups, 1)) * scale
            weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
            out.append(torch.einsum("hts,shd->thd", weights, values.float().repeat_interleave(groups, 1)))
        return torch.cat(out).to(q.dtype)

    def geometry(self, dtype: str) -> Geometry:
        """Return what the layers showed; all must be of one size."""
        if len(self._shapes) != 1:
            self._refuse(f"its layers differ in (heads, kv heads, head size): {sorted(self._shapes)}")
        heads, kv_heads, head_dim = next(iter(self._shapes))
        return Geometry(
            layers=self._config.num_hidden_layers,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            vocab_size=self._config.vocab_size,
            max_positions=max_positions(self._config),
            dtype=dtype,
        )

    def _refuse(self, reason: str) -> None:
        raise UnsupportedModelError(f"model type {self._config.model_type!r} cannot run with DistAttention: {reason}.")


def _observed_attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **keywords: Any
) -> tuple[Tensor, None]:
    observer = cast(_Observer, running_step())
    observer.look(module, query, key, value, {**keywords, "attention_mask": attention_mask})
    return dist_attention(module, query, key, value, attention_mask, keywords.get("scaling"))


AttentionInterface.register(_OBSERVING, _observed_attention)
