"""From logits to the next tokens, filtered as Hugging Face's ``generate`` does, in float64, on the logits' device.

A draw uses one uniform number made from (seed, position) alone. So it is the same in any batch, in a retried window and
on any device. Extreme parameters give the token that they tend to: a tiny temperature the greedy one, for instance. The
whole batch is drawn at once, and the host waits for the device once: for the tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from math import isfinite
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from distkv_dask.errors import DistKVError, ModelError, portable
from distkv_dask.sampling import SamplingParams
from distkv_dask.worker.device import HOST, Device

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


def sample_batch(logits: Tensor, draws: Sequence[Draw], device: Device = HOST) -> list[int | DistKVError]:
    """Choose the next tokens of a batch.

    Parameters
    ----------
    logits
        float32 [rows, vocab] on the device; overwritten where a schema forbids tokens.
    draws
        One for each row. The ``seed`` must be set where the temperature is not 0.
    device
        Where the logits are.

    Returns
    -------
    list
        For each row its token, an index into its logits, or the error that kept it from having one.
    """
    largest, tokens = logits.max(-1)
    errors = _restrict(logits, draws, device)
    if any(draw.follower is not None for draw in draws):
        tokens = logits.argmax(-1)
    drawn = [row for row, draw in enumerate(draws) if _is_drawn(draw.params) and row not in errors]
    if drawn:
        rows = device.put(torch.tensor(drawn))
        tokens = tokens.index_copy(0, rows, _sampled(logits[rows], [draws[row] for row in drawn], device))
    found = torch.stack((largest.double(), tokens.double())).cpu().T.tolist()
    return [
        errors.get(row) or (int(token) if isfinite(most) else _not_finite(draws[row]))  # of NaN and others, NaN is most
        for row, (most, token) in enumerate(found)
    ]


def probabilities(logits: Tensor, draws: Sequence[Draw], device: Device = HOST) -> Tensor:
    """Probabilities of the next tokens, float64 [rows, vocab].

    Parameters
    ----------
    logits
        float32 [rows, vocab] on the device, of which in each row at least one is above -inf and none is inf or NaN.
    draws
        One for each row, with temperatures above 0.
    device
        Where the logits are.
    """
    every = [draw.params for draw in draws]
    scores = _penalised(logits.double(), draws, device)
    scores = scores - scores.max(-1, keepdim=True).values  # the quotient by a tiny temperature is -inf then, or 0
    settings = [(one.temperature, one.top_k or 0, one.top_p, one.min_p) for one in every]
    temperature, top_k, top_p, min_p = device.put(torch.tensor(settings, dtype=torch.float64)).T[:, :, None]
    scores = scores / temperature
    if any(one.top_k > 0 for one in every):
        scores = _best(scores, top_k)
    if any(one.top_p < 1 for one in every):
        scores = _nucleus(scores, top_p)
    if any(one.min_p > 0 for one in every):
        chances = scores.softmax(-1)
        scores = scores.masked_fill(chances < min_p * chances.max(-1, keepdim=True).values, -torch.inf)
    return scores.softmax(-1)


def _is_drawn(params: SamplingParams) -> bool:
    """Whether a row's token is another than that of its largest logit."""
    return params.temperature != 0 or params.repetition_penalty != 1


def _restrict(logits: Tensor, draws: Sequence[Draw], device: Device) -> dict[int, DistKVError]:
    """Forbid what the schemas forbid; the errors of rows that cannot be drawn for."""
    errors: dict[int, DistKVError] = {}
    for row, draw in enumerate(draws):
        try:
            if draw.follower is not None:
                forbidden = device.put(draw.follower.forbidden(logits.shape[1]))
                with torch.inference_mode():  # in which the logits were made
                    logits[row].masked_fill_(forbidden, -torch.inf)
            if draw.params.temperature != 0 and draw.params.seed is None:
                raise ValueError("a draw needs SamplingParams.seed; None must be replaced where the request is made")
            if draw.params.repetition_penalty != 1 and not all(0 <= one < logits.shape[1] for one in draw.history):
                raise ValueError("the history has tokens that the model does not know")
        except Exception as error:
            errors[row] = portable(error, f"the draw of the token at position {draw.position}")
    return errors


def _sampled(logits: Tensor, draws: Sequence[Draw], device: Device) -> Tensor:
    """Tokens of rows that are drawn or penalised, int64 [rows] on the device."""
    best = _penalised(logits.double(), draws, device).argmax(-1)
    warm = [row for row, draw in enumerate(draws) if draw.params.temperature != 0]
    if not warm:
        return best
    some = [draws[row] for row in warm]
    rows = device.put(torch.tensor(warm))
    cumulative = probabilities(logits[rows], some, device).cumsum(-1)
    uniform = device.put(torch.tensor([_uniform(int(one.params.seed or 0), one.position) for one in some]).double())
    tokens = torch.searchsorted(cumulative, cumulative[:, -1:] * uniform[:, None])
    return best.index_copy(0, rows, tokens[:, 0])


def _penalised(scores: Tensor, draws: Sequence[Draw], device: Device) -> Tensor:
    """Scores, float64 [rows, vocab], with the repetition penalties of tokens that were there before."""
    if all(draw.params.repetition_penalty == 1 for draw in draws):
        return scores
    vocab = scores.shape[1]
    histories = [[] if draw.params.repetition_penalty == 1 else list(draw.history) for draw in draws]
    longest = max(map(len, histories))
    padded = device.put(torch.tensor([one + [vocab] * (longest - len(one)) for one in histories], dtype=torch.int64))
    seen = torch.zeros(len(draws), vocab + 1, dtype=torch.bool, device=scores.device)
    seen.scatter_(1, padded, True)
    penalties = [min(max(one.params.repetition_penalty, 1 / LARGEST_PENALTY), LARGEST_PENALTY) for one in draws]
    penalty = device.put(torch.tensor(penalties, dtype=torch.float64))[:, None]
    return torch.where(seen[:, :vocab], torch.where(scores < 0, scores * penalty, scores / penalty), scores)


def _best(scores: Tensor, top_k: Tensor) -> Tensor:
    """Leave the ``top_k`` largest of each row, float64 [rows, 1]; 0 leaves all."""
    vocab = scores.shape[1]
    last = torch.where(top_k > 0, top_k, vocab).clamp(max=vocab).long() - 1
    least = scores.sort(-1, descending=True).values.gather(1, last)
    return scores.masked_fill(scores < least, -torch.inf)


def _nucleus(scores: Tensor, top_p: Tensor) -> Tensor:
    """Leave the likeliest of each row that together have ``top_p``, float64 [rows, 1], and one at least."""
    ordered, order = scores.sort(stable=True, dim=-1)
    gone = ordered.softmax(-1).cumsum(-1) <= 1 - top_p
    gone[:, -1] = False
    return scores.masked_fill(torch.empty_like(gone).scatter_(1, order, gone), -torch.inf)


def _not_finite(draw: Draw) -> ModelError:
    return ModelError(
        f"the model's logits of the token at position {draw.position} are not finite: its weights are damaged, or its "
        "dtype overflows; open the engine with dtype='float32'"
    )


def _uniform(seed: int, position: int) -> float:
    """Return a number in (0, 1], uniform over seeds and positions."""
    digest = hashlib.blake2b(f"{seed}:{position}".encode(), digest_size=8).digest()
    return ((int.from_bytes(digest, "little") >> 11) + 1) / 2**53
