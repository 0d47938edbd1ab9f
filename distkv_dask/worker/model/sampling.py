"""From logits to the next token, filtered as Hugging Face's ``generate`` does, in float64.

A draw uses one uniform number made from (seed, position) alone. So it is the same in any batch, in a retried window and
on any device. Extreme parameters give the token that they tend to: a tiny temperature the greedy one, for instance.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from math import isfinite
from typing import TYPE_CHECKING, NamedTuple

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

from distkv_dask.errors import DistKVError, ModelError, portable
from distkv_dask.sampling import SamplingParams

if TYPE_CHECKING:
    from distkv_dask.worker.model.structured import Follower

LARGEST_PENALTY = 1e100
"""Penalties beyond this change no order of float32 logits any more, and their products would overflow float64."""


class Draw(NamedTuple):
    """How the next token of one sequence is chosen.

    ``position`` is the one that the token will have in its sequence; ``history``, all tokens so far, is looked at only
    when there is a repetition penalty; ``follower`` says which tokens a schema allows.
    """

    params: SamplingParams
    position: int
    history: Sequence[int] = ()
    follower: Follower | None = None


def sample_batch(logits: Tensor, draws: Sequence[Draw]) -> list[int | DistKVError]:
    """Choose the next tokens of a batch.

    Parameters
    ----------
    logits
        float32 [rows, vocab]; overwritten where a schema forbids tokens.
    draws
        One for each row. The ``seed`` must be set where the temperature is not 0.

    Returns
    -------
    list
        For each row its token, an index into its logits, or the error that kept it from having one.
    """
    best = logits.max(-1)
    rows = zip(logits, draws, best.values.tolist(), best.indices.tolist(), strict=True)
    return [_chosen(*row) for row in rows]


def _chosen(logits: Tensor, draw: Draw, largest: float, token: int) -> int | DistKVError:
    """Choose a row's token, whose errors are its own; ``token`` has the ``largest`` logit."""
    try:
        if not isfinite(largest):  # the largest of NaN and others is NaN
            raise ModelError(
                f"the model's logits of the token at position {draw.position} are not finite: its weights are damaged, "
                "or its dtype overflows; open the engine with dtype='float32'"
            )
        params, follower = draw.params, draw.follower
        if follower is not None:
            follower.restrict(logits)
        elif params.temperature == 0 and params.repetition_penalty == 1:
            return token
        return _sampled(logits, params, draw.position, draw.history)
    except Exception as error:
        return portable(error, f"the draw of the token at position {draw.position}")


def _sampled(logits: Tensor, params: SamplingParams, position: int, history: Sequence[int]) -> int:
    if params.temperature == 0:
        return int(_penalised(logits, params.repetition_penalty, history).argmax())
    if params.seed is None:
        raise ValueError("a draw needs SamplingParams.seed; None must be replaced where the request is made")
    cumulative = probabilities(logits, params, history).cumsum(-1)
    return int(torch.searchsorted(cumulative, cumulative[-1:] * _uniform(params.seed, position)))


def probabilities(logits: Tensor, params: SamplingParams, history: Sequence[int] = ()) -> Tensor:
    """Probabilities of the next token, float64 [vocab], at a temperature above 0.

    Parameters
    ----------
    logits
        float32 [vocab], of which at least one is above -inf and none is inf or NaN.
    params, history
        As in :class:`Draw`.
    """
    scores = _penalised(logits, params.repetition_penalty, history)
    scores = scores - scores.max()  # the quotient by a tiny temperature is -inf then, or 0
    history_unread = torch.empty(1, 0, dtype=torch.long)
    kept: Tensor = _filters(params)(history_unread, scores[None])[0]  # type: ignore[arg-type]
    return kept.softmax(-1)


def _penalised(logits: Tensor, penalty: float, history: Sequence[int]) -> Tensor:
    """Logits in float64, those of ``history`` with the repetition penalty."""
    scores = logits.double()
    if penalty == 1:
        return scores
    penalty = min(max(penalty, 1 / LARGEST_PENALTY), LARGEST_PENALTY)
    tokens = torch.as_tensor(history, dtype=torch.long, device=logits.device)
    penalised: Tensor = RepetitionPenaltyLogitsProcessor(penalty)(tokens[None], scores[None])[0]
    return penalised


@lru_cache(maxsize=256)
def _filters(params: SamplingParams) -> LogitsProcessorList:
    """Return the filters in the order of ``generate``; those that do nothing are left out."""
    filters = LogitsProcessorList()
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
