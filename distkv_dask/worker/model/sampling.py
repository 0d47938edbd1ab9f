"""From logits to the next tokens, filtered as Hugging Face's ``generate`` does, in float64, on the logits' device.

A draw uses one uniform number made from (seed, position) alone. So it is the same in any batch, in a retried window and
on any device, up to rounding. Extreme parameters give their limits: a tiny temperature the greedy token, for instance.
The whole batch is drawn at once on a card, and the host waits for it once: for the tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from math import isfinite
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from distkv_dask.errors import DistKVError, ModelError, portable
from distkv_dask.sampling import SamplingParams
from distkv_dask.worker.device import HOST, Device

if TYPE_CHECKING:
    from distkv_dask.worker.model.structured import Follower

LARGEST_PENALTY = 1e100
"""Larger penalties no longer change the order of float32 logits, and their products would overflow float64."""

ROWS = 1
"""Rows that are drawn at once on the host: more exceed the processor's cache, and take several times as long each."""


class Draw(NamedTuple):
    """How the next token of one sequence is chosen.

    ``position`` is the one that the token will have in its sequence; ``history``, all tokens so far, is used only with
    a repetition penalty; ``follower`` says which tokens a schema allows.
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
        float32 [rows, vocab] on the device; overwritten if a schema forbids tokens.
    draws
        One for each row. The ``seed`` must be set unless the temperature is 0.
    device
        Where the logits are.

    Returns
    -------
    list
        For each row its token, an index into its logits, or the error that prevented it.
    """
    largest, tokens = logits.max(-1)
    errors = _restrict(logits, draws, device)
    if any(draw.follower is not None for draw in draws):
        tokens = logits.argmax(-1)
    drawn = [row for row, draw in enumerate(draws) if _is_drawn(draw.params) and row not in errors]
    size = ROWS if device.is_host else max(1, len(drawn))
    for some in (drawn[at : at + size] for at in range(0, len(drawn), size)):
        tokens = _draw_rows(tokens, logits, draws, some, device, errors)
    found = torch.stack((largest.double(), tokens.double())).cpu().T.tolist()
    return [
        errors.get(row) or (int(token) if isfinite(most) else _not_finite(draws[row]))  # a maximum with NaN is NaN
        for row, (most, token) in enumerate(found)
    ]


def probabilities(logits: Tensor, draws: Sequence[Draw], device: Device = HOST) -> Tensor:
    """Probabilities of the next tokens, float64 [rows, vocab].

    Parameters
    ----------
    logits
        float32 [rows, vocab] on the device; each row has at least one above -inf, and none is inf or NaN.
    draws
        One for each row, with temperatures above 0.
    device
        Where the logits are.
    """
    return _probabilities(_penalised(logits.double(), draws, device), [draw.params for draw in draws], device)


def _probabilities(scores: Tensor, every: Sequence[SamplingParams], device: Device) -> Tensor:
    """Probabilities, float64 [rows, vocab], of scores with penalties."""
    scores = scores - scores.max(-1, keepdim=True).values  # so that the quotient by a tiny temperature is -inf or 0
    vocab = scores.shape[1]
    settings = [(one.temperature, min(one.top_k, vocab), one.top_p, one.min_p) for one in every]
    temperature, top_k, top_p, min_p = device.put(torch.tensor(settings, dtype=torch.float64)).T[:, :, None]
    scores = scores / temperature
    if any(one.top_k > 0 for one in every):
        scores = _best(scores, top_k, min(max(one.top_k for one in every), vocab))
    if any(one.top_p < 1 for one in every):
        scores = _nucleus(scores, top_p)
    if any(one.min_p > 0 for one in every):
        chances = scores.softmax(-1)
        scores = scores.masked_fill(chances < min_p * chances.max(-1, keepdim=True).values, -torch.inf)
    return scores.softmax(-1)


def _is_drawn(params: SamplingParams) -> bool:
    """Whether a row's token may differ from that of its largest logit."""
    return params.temperature != 0 or params.repetition_penalty != 1


def _restrict(logits: Tensor, draws: Sequence[Draw], device: Device) -> dict[int, DistKVError]:
    """Forbid the tokens that schemas forbid; returns the errors of rows without a possible draw."""
    errors: dict[int, DistKVError] = {}
    for row, draw in enumerate(draws):
        if draw.follower is None:
            continue
        try:
            forbidden = device.put(draw.follower.forbidden(logits.shape[1]))
            with torch.inference_mode():  # in which the logits were computed
                logits[row].masked_fill_(forbidden, -torch.inf)
        except Exception as error:
            errors[row] = _failed(error, draw)
    return errors


def _draw_rows(
    tokens: Tensor, logits: Tensor, draws: Sequence[Draw], some: Sequence[int], device: Device,
    errors: dict[int, DistKVError],
) -> Tensor:  # fmt: skip
    """The tokens, those of some rows drawn: all at once, or one by one if that fails."""
    try:
        rows = device.put(torch.tensor(some))
        return tokens.index_copy(0, rows, _sampled(logits[rows], [draws[row] for row in some], device))
    except Exception as error:
        if len(some) == 1:
            errors[some[0]] = _failed(error, draws[some[0]])
            return tokens
    for row in some:
        tokens = _draw_rows(tokens, logits, draws, [row], device, errors)
    return tokens


def _sampled(logits: Tensor, draws: Sequence[Draw], device: Device) -> Tensor:
    """Tokens of rows that are drawn or penalised, int64 [rows] on the device."""
    scores = _penalised(logits.double(), draws, device)
    warm = [row for row, draw in enumerate(draws) if draw.params.temperature != 0]
    if not warm:
        return scores.argmax(-1)
    some = [draws[row] for row in warm]
    numbers = [_uniform(draw.params.seed, draw.position) for draw in some]
    uniform = device.put(torch.tensor(numbers, dtype=torch.float64))[:, None]
    if len(warm) == len(draws):
        return _drawn(scores, some, uniform, device)
    rows = device.put(torch.tensor(warm))
    return scores.argmax(-1).index_copy(0, rows, _drawn(scores[rows], some, uniform, device))


def _drawn(scores: Tensor, draws: Sequence[Draw], uniform: Tensor, device: Device) -> Tensor:
    cumulative = _probabilities(scores, [draw.params for draw in draws], device).cumsum(-1)
    return torch.searchsorted(cumulative, cumulative[:, -1:] * uniform)[:, 0]


def _penalised(scores: Tensor, draws: Sequence[Draw], device: Device) -> Tensor:
    """Scores, float64 [rows, vocab], written to: with the repetition penalties of earlier tokens."""
    some = [(row, draw) for row, draw in enumerate(draws) if draw.params.repetition_penalty != 1 and draw.history]
    if not some:
        return scores
    tokens = [np.asarray(draw.history, np.int64) for _, draw in some]
    if any(one.min() < 0 or one.max() >= scores.shape[1] for one in tokens):
        raise ValueError("the history has tokens that are not in the model's vocabulary")
    counts = [len(one) for one in tokens]
    where = np.stack((np.repeat([row for row, _ in some], counts), np.concatenate(tokens)))
    penalties = [min(max(draw.params.repetition_penalty, 1 / LARGEST_PENALTY), LARGEST_PENALTY) for _, draw in some]
    rows, columns = device.put(torch.from_numpy(where))
    penalty = device.put(torch.from_numpy(np.repeat(np.array(penalties, np.float64), counts)))
    before = scores[rows, columns]
    scores[rows, columns] = torch.where(before < 0, before * penalty, before / penalty)  # the same for the same token
    return scores


def _best(scores: Tensor, top_k: Tensor, most: int) -> Tensor:
    """Leave the ``top_k`` largest of each row, float64 [rows, 1], ``most`` at most; 0 leaves all."""
    least = scores.topk(most).values.gather(1, top_k.long().clamp(min=1) - 1)
    return scores.masked_fill((scores < least) & (top_k > 0), -torch.inf)


def _nucleus(scores: Tensor, top_p: Tensor) -> Tensor:
    """Leave the most likely of each row that together have ``top_p``, float64 [rows, 1], and at least one."""
    ordered, order = scores.sort(stable=True, dim=-1)
    gone = ordered.softmax(-1).cumsum(-1) <= 1 - top_p
    gone[:, -1] = False
    return scores.masked_fill(torch.empty_like(gone).scatter_(1, order, gone), -torch.inf)


def _failed(error: Exception, draw: Draw) -> DistKVError:
    return portable(error, f"the draw of the token at position {draw.position}")


def _not_finite(draw: Draw) -> ModelError:
    return ModelError(
        f"the model's logits of the token at position {draw.position} are not finite: its weights are damaged, or its "
        "dtype overflows; open the engine with dtype='float32'"
    )


def _uniform(seed: int | None, position: int) -> float:
    """Return a number in (0, 1], uniform over seeds and positions."""
    if seed is None:
        raise ValueError("a draw needs SamplingParams.seed; None must be replaced where the request is made")
    digest = hashlib.blake2b(f"{seed}:{position}".encode(), digest_size=8).digest()
    return ((int.from_bytes(digest, "little") >> 11) + 1) / 2**53
