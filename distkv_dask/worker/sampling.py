"""From logits to the next token, filtered exactly as Hugging Face's ``generate`` does.

A draw uses one uniform number made from (seed, position) alone. So it is the same in any batch, in a retried window and
on any device.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from distkv_dask.types import SamplingParams


def sample(logits: Tensor, params: SamplingParams, position: int, history: Sequence[int] = ()) -> int:
    """Choose the next token of one sequence.

    Parameters
    ----------
    logits
        float32 [vocab].
    params
        Its ``seed`` must be set when its temperature is not 0.
    position
        Position in the sequence that the token will have.
    history
        All tokens of the sequence so far; looked at only when there is a repetition penalty.

    Raises
    ------
    ValueError
        When a draw is asked for without a seed.
    """
    filters = _filters(params)
    if filters:
        tokens = torch.as_tensor(history, dtype=torch.long, device=logits.device)
        logits = filters(tokens[None], logits[None])[0]  # type: ignore[arg-type]
    if params.temperature == 0:
        return int(logits.argmax())
    if params.seed is None:
        raise ValueError("a draw needs SamplingParams.seed; None must be replaced where the request is made")
    cumulative = logits.softmax(-1, dtype=torch.float64).cumsum(-1)
    return int(torch.searchsorted(cumulative, cumulative[-1:] * _uniform(params.seed, position)))


def sample_batch(logits: Tensor, rows: Sequence[tuple[SamplingParams, int, Sequence[int]]]) -> list[int]:
    """Choose the next tokens of a batch.

    Parameters
    ----------
    logits
        float32 [rows, vocab].
    rows
        Parameters, position and history of each, as :func:`sample` takes them.
    """
    tokens: list[int] = logits.argmax(-1).tolist()
    for at, (params, position, history) in enumerate(rows):
        if params.temperature > 0 or params.repetition_penalty != 1:
            tokens[at] = sample(logits[at], params, position, history)
    return tokens


@lru_cache(maxsize=256)
def _filters(params: SamplingParams) -> LogitsProcessorList:
    """Return the filters in the order of ``generate``; those that do nothing are left out."""
    filters = LogitsProcessorList()
    if params.repetition_penalty != 1:
        filters.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    if params.temperature == 0:
        return filters
    if params.temperature != 1:
        filters.append(TemperatureLogitsWarper(params.temperature))
    if params.top_k > 0:
        filters.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        filters.append(TopPLogitsWarper(params.top_p))
    if params.min_p > 0:
        filters.append(MinPLogitsWarper(params.min_p))
    return filters


def _uniform(seed: int, position: int) -> float:
    """Return a number in (0, 1], uniform over seeds and positions."""
    digest = hashlib.blake2b(f"{seed}:{position}".encode(), digest_size=8).digest()
    return ((int.from_bytes(digest, "little") >> 11) + 1) / 2**53
