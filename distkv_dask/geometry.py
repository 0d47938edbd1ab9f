"""Sizes of a model, and how fast a worker is with it.

Units: positions and lengths are tokens, times are seconds, memory is bytes. A worker is named by its Dask address.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class LayerKind:
    """Which earlier tokens a layer's queries see, and how it changes their scores.

    Parameters
    ----------
    visible
        As in transformers' ``layer_types``: ``full`` is all earlier tokens; ``sliding`` the last ``size``, the
        query's own token among them; ``chunked`` those from the last multiple of ``size`` on.
    size
        Tokens of a window or chunk; 0 for ``full``.
    soft_cap
        Scores become ``soft_cap * tanh(score / soft_cap)``; None leaves them unchanged.
    """

    visible: Literal["full", "sliding", "chunked"] = "full"
    size: int = 0
    soft_cap: float | None = None

    def first(self, position: Any) -> Any:
        """First position that a query at ``position`` (an integer or an array) sees; below 0, all of them."""
        if self.visible == "sliding":
            return position - self.size + 1
        return position // self.size * self.size if self.visible == "chunked" else position * 0


@dataclass(frozen=True, slots=True)
class Geometry:
    """Sizes of a model that fix the layout of KV and the range of requests.

    ``kv_heads`` and ``head_dim`` are those of the pool: layers that have less are padded. ``max_positions`` is the
    longest sequence in tokens; ``dtype`` is torch's name of the dtype, e.g. ``bfloat16``; ``layer_kinds`` has one kind
    per layer, or is empty if all of them see everything. If ``latent_dim`` is not 0 (latent attention), values are the
    first ``latent_dim`` numbers of the keys, and stored once. ``layers`` counts those with attention: a model may also
    have recurrent ones, which keep ``state_bytes`` per sequence. If they ``scan_once``, they cannot continue from a
    state with several tokens at once. KV of ``home_layers`` stays at the home of its sequence, that of ``far_layers``
    may be on any workers.
    """

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    dtype: str
    layer_kinds: tuple[LayerKind, ...] = ()
    latent_dim: int = 0
    state_bytes: int = 0
    scan_once: bool = False

    @property
    def value_dim(self) -> int:
        """Numbers of a value of one head."""
        return self.latent_dim or self.head_dim

    @property
    def home_layers(self) -> tuple[int, ...]:
        """Layers that see only a window, which is short compared with the longest sequence."""
        return near_layers(self.layer_kinds, self.max_positions)

    @property
    def far_layers(self) -> tuple[int, ...]:
        """The other layers with attention."""
        return tuple(sorted({*range(self.layers)} - {*self.home_layers}))

    @property
    def window(self) -> int:
        """Maximum tokens that ``home_layers`` see."""
        return max((self.layer_kinds[layer].size for layer in self.home_layers), default=0)

    @property
    def layer_numbers(self) -> int:
        """Numbers that a layer stores per token."""
        return self.kv_heads * self.head_dim * (1 if self.latent_dim else 2)

    @property
    def kv_numbers(self) -> int:
        """Numbers that are stored per token in ``far_layers``."""
        return len(self.far_layers) * self.layer_numbers

    @property
    def home_bytes(self) -> int:
        """Bytes of a sequence that only its home has: a state, and the KV of ``home_layers``."""
        size = 4 if self.dtype == "float32" else 2
        return self.state_bytes + len(self.home_layers) * self.window * self.layer_numbers * size


def near_layers(kinds: Sequence[LayerKind], max_positions: int) -> tuple[int, ...]:
    """Which layers' KV stays at the home of its sequence: that of windows, freed as it leaves them.

    There must be other layers, and windows must be so short that two of them take at most half of the memory that the
    longest sequence would.

    Examples
    --------
    >>> near_layers((LayerKind("sliding", 512), LayerKind()), 4096)
    (0,)
    >>> near_layers((LayerKind("sliding", 2048), LayerKind()), 4096)
    ()
    """
    near = tuple(layer for layer, kind in enumerate(kinds) if kind.visible != "full")
    longest = max((kinds[layer].size for layer in near), default=0)
    return near if len(near) < len(kinds) and (not max_positions or 4 * longest <= max_positions) else ()


def describe_kinds(kinds: Sequence[LayerKind]) -> str:
    """Kinds of layers in one line: the meaning of each letter, then a letter per layer.

    Examples
    --------
    >>> describe_kinds((LayerKind("sliding", 512), LayerKind("sliding", 512), LayerKind(soft_cap=50.0)))
    'a=sliding 512, b=full cap 50; aab'
    """
    letters = {kind: chr(ord("a") + at) for at, kind in enumerate(dict.fromkeys(kinds))}
    words = {
        kind: " ".join(
            [
                kind.visible,
                *([f"{kind.size}"] if kind.size else []),
                *([f"cap {kind.soft_cap:g}"] if kind.soft_cap else []),
            ]
        )
        for kind in letters
    }
    legend = ", ".join(f"{letter}={words[kind]}" for kind, letter in letters.items())
    return f"{legend}; {''.join(letters[kind] for kind in kinds)}"


@dataclass(frozen=True, slots=True)
class Measurement:
    """Short timings of one worker, in seconds, which the performance model is fitted to.

    Parameters
    ----------
    decode
        (sequences, tokens of KV of all of them together, seconds of a step).
    prompt
        (tokens of a prompt's chunk, tokens of KV before them, seconds).
    attention
        (tokens of KV, seconds of one query over them in all layers): the only ones of a worker without a model.
    exchange
        Seconds that asking a holder on the same machine adds to a step; None if that was not measured.
    """

    decode: tuple[tuple[int, int, float], ...] = ()
    prompt: tuple[tuple[int, int, float], ...] = ()
    attention: tuple[tuple[int, float], ...] = ()
    exchange: float | None = None


@dataclass(frozen=True, slots=True)
class LinkTimes:
    """How fast frames travel between two workers: seconds one way for a small one, bytes per second for large ones."""

    latency: float
    bandwidth: float
