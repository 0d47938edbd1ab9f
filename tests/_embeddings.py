"""Embeddings of plain transformers in float64, and an error limit derived from those in float32."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
import torch
import transformers
from numpy.typing import NDArray


@lru_cache(maxsize=4)
def _plain(model: str, dtype: torch.dtype) -> transformers.PreTrainedModel:
    return transformers.AutoModel.from_pretrained(model, dtype=dtype, experts_implementation="eager").eval()


@cache
def _hidden(model: str, tokens: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Hidden states [tokens, size] from one forward of the model without its head."""
    with torch.no_grad():
        return _plain(model, dtype)(torch.tensor([tokens]), use_cache=False).last_hidden_state[0].double()


def expected(
    model: Path | str, tokens: Sequence[int], pooling: str, dtype: torch.dtype = torch.float64
) -> torch.Tensor:
    """The embedding of a text, float64 [size]."""
    hidden = _hidden(str(model), tuple(tokens), dtype)
    return hidden.mean(0) if pooling == "mean" else hidden[-1]


def check(model: Path | str, tokens: Sequence[int], pooling: str, found: NDArray[np.float32] | None) -> None:
    """The error against float64 is at most three times that of transformers' own float32, over all numbers.

    Another order of additions changes the error, but not its size; a wrong token or position makes it ten thousand
    times larger.
    """
    assert found is not None
    assert found.dtype == np.float32
    right = expected(model, tokens, pooling)
    assert found.shape == tuple(right.shape)
    own = float((expected(model, tokens, pooling, torch.float32) - right).norm())
    error = float((torch.from_numpy(found.astype(np.float64)) - right).norm())
    norm = float(right.norm())
    assert error <= 3 * own + 1e-6 * norm, (len(tokens), pooling, error / norm, own / norm)
