"""Embeddings of prompts, computed from sums over their parts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from distkv_dask.errors import DistKVError
from distkv_dask.gang import Pooled
from distkv_dask.sampling import SamplingParams


def embedding_of(parts: Sequence[Pooled], tokens: int, sampling: SamplingParams) -> NDArray[np.float32]:
    """A prompt's embedding, float32 [hidden size].

    Parameters
    ----------
    parts
        Sums of hidden states over parts of the prompt, one after the other.
    tokens
        Of the prompt.
    sampling
        How it is pooled.

    Raises
    ------
    DistKVError
        When the parts are not those of the prompt.

    Examples
    --------
    >>> parts = [Pooled(0, 1, np.array([1.0, 2.0]).tobytes()), Pooled(1, 3, np.array([5.0, 1.0]).tobytes())]
    >>> embedding_of(parts, 3, SamplingParams(embed="mean")).tolist()
    [2.0, 1.0]
    """
    start = tokens - 1 if sampling.embed == "last" else 0
    borders = [start, *(one.stop for one in parts)]
    if [one.start for one in parts] != borders[:-1] or borders[-1] != tokens:
        raise DistKVError(
            f"hidden states arrived for tokens {[one[:2] for one in parts]} of {tokens}, so there is no embedding; "
            "this is a fault of the engine, please report it"
        )
    sums = np.stack([np.frombuffer(one.sums, "<f8") for one in parts])
    mean: NDArray[np.float64] = sums.sum(0) / (tokens - start)
    if sampling.normalize:
        mean /= max(float(np.linalg.norm(mean)), np.finfo(np.float64).tiny)
    return mean.astype(np.float32)
