"""Sizes of a model, and how fast a worker is with it.

Units: positions and lengths are tokens, times are seconds, memory is bytes. A worker is named by its Dask address.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Geometry:
    """Sizes of a model that fix the layout of KV and the range of requests.

    ``max_positions`` is the longest sequence in tokens; ``dtype`` is torch's name of the dtype, e.g. ``bfloat16``.
    """

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    dtype: str


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
        Seconds that it adds to a step to ask a holder on the same machine; None where that was not measured.
    """

    decode: tuple[tuple[int, int, float], ...] = ()
    prompt: tuple[tuple[int, int, float], ...] = ()
    attention: tuple[tuple[int, float], ...] = ()
    exchange: float | None = None
