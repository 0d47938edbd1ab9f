"""Log probabilities: that of a token, and the most likely tokens in its place."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

MOST_LOGPROBS = 20
"""Maximum alternatives of a token, as in OpenAI's API."""


class TokenLogprob(NamedTuple):
    """A token and its natural log probability, by the model's own distribution of the tokens at its place.

    That is the softmax of the model's logits: temperature, filters, penalties and schemas do not count. ``best`` are
    the most likely tokens and their log probabilities, best first; the token itself may be one of them.
    """

    token_id: int
    logprob: float
    best: tuple[tuple[int, float], ...] = ()


def perplexity(logprobs: Iterable[TokenLogprob | None]) -> float:
    """Perplexity of tokens: exp of their mean negative log probability, without those that have none.

    Examples
    --------
    >>> perplexity([None, TokenLogprob(5, -1.0), TokenLogprob(7, -3.0)]) == math.exp(2.0)
    True
    >>> perplexity([None])
    nan
    """
    some = [one.logprob for one in logprobs if one is not None]
    if not some:
        return math.nan
    mean = -math.fsum(some) / len(some)
    return math.exp(mean) if mean < 700 else math.inf
