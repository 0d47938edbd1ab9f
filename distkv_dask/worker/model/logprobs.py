"""Log probabilities of tokens, in float64 on the logits' device, and draws that come with them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import isfinite
from typing import NamedTuple

import torch
from torch import Tensor

from distkv_dask.errors import DistKVError, ModelError
from distkv_dask.logprobs import TokenLogprob
from distkv_dask.worker.device import HOST, Device
from distkv_dask.worker.model.sampling import Draw, sample_batch

ROWS = 16
"""Rows that are converted to float64 at once: more would take hundreds of megabytes."""


class Drawn(NamedTuple):
    """A token, with its log probability if that was requested."""

    token: int
    logprob: TokenLogprob | None = None


def draw_batch(logits: Tensor, draws: Sequence[Draw], device: Device = HOST) -> list[Drawn | DistKVError]:
    """Choose the next tokens of a batch as :func:`sample_batch` does, with log probabilities for those that want them.

    Log probabilities are of the unchanged logits: schemas forbid tokens only in draws.
    """
    wanting = [row for row, draw in enumerate(draws) if draw.params.logprobs is not None]
    if not wanting:
        return [Drawn(one) if isinstance(one, int) else one for one in sample_batch(logits, draws, device)]
    raw = logits[device.put(torch.tensor(wanting))]  # a copy
    found: list[Drawn | DistKVError] = []
    scored = dict(zip(wanting, range(len(wanting)), strict=True))
    for row, one in enumerate(sample_batch(logits, draws, device)):
        if not isinstance(one, int):
            found.append(one)
        elif row not in scored:
            found.append(Drawn(one))
        else:
            at, best = scored[row], draws[row].params.logprobs
            found.append(Drawn(one, token_logprobs(raw[at : at + 1], [[one]], best or 0, device)[0]))
    return found


def token_logprobs(
    logits: Tensor, tokens: Sequence[Sequence[int]], best: int, device: Device = HOST
) -> list[TokenLogprob]:
    """Log probabilities of tokens, one row after the other.

    Parameters
    ----------
    logits
        float32 [rows, vocab] on the device.
    tokens
        Some tokens for each row.
    best
        How many of the most likely tokens come with it.
    device
        Where the logits are.

    Raises
    ------
    ModelError
        When logits are not finite.
    """
    best, found = min(best, logits.shape[1]), list[TokenLogprob]()
    for first in range(0, len(tokens), ROWS):
        found += _few_logprobs(logits[first : first + ROWS].double(), tokens[first : first + ROWS], best, device)
    return found


def _few_logprobs(logits: Tensor, tokens: Sequence[Sequence[int]], best: int, device: Device) -> Iterator[TokenLogprob]:
    """Log probabilities of tokens of a few rows, float64 [rows, vocab]."""
    flat = [(row, token) for row, some in enumerate(tokens) for token in some]
    rows, ids = device.put(torch.tensor(flat, dtype=torch.int64).reshape(-1, 2).T)
    whole, most = logits.logsumexp(-1, keepdim=True), logits.topk(best)
    by_row = torch.cat((whole, most.values - whole, most.indices.double()), 1).cpu().tolist()
    own = (logits[rows, ids] - whole[rows, 0]).tolist()
    if not all(isfinite(whole) for whole, *_ in by_row):
        raise ModelError(
            "the model's logits of a prompt token are not finite: its weights are damaged, or its dtype overflows; "
            "open the engine with dtype='float32'"
        )
    others = [tuple(zip(map(int, more[best:]), more[:best], strict=True)) for _, *more in by_row]
    return (TokenLogprob(token, logprob, others[row]) for (row, token), logprob in zip(flat, own, strict=True))
