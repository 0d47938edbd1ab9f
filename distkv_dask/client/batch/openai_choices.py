"""The choices of an answer in OpenAI's format: one for each answer to the prompt, with log probabilities if wanted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any

from distkv_dask.client.tokenizer import Tokenizer
from distkv_dask.completion import Completion
from distkv_dask.logprobs import TokenLogprob

LEAST = -9999.0
"""Replaces the logarithm of 0, for which JSON has no number; as in OpenAI's API."""

Decode = Callable[[int], str]


def choices_of(done: Sequence[Completion], chat: bool, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """The choices of a response.

    Parameters
    ----------
    done
        The completion of each prompt.
    chat
        Whether it answers chat messages.
    tokenizer
        The model's.
    """
    choices: list[dict[str, Any]] = []
    for whole in done:
        first = len(choices)
        choices += (_choice(first + at, one, chat, tokenizer) for at, one in enumerate(whole.answers))
        if whole.prompt_logprobs is not None:
            decode = _decoder(tokenizer)
            scored = [None if one is None else _by_id(one, decode) for one in whole.prompt_logprobs]
            choices[first]["prompt_logprobs"] = scored
    return choices


def chat_logprobs(logprobs: Sequence[TokenLogprob], tokenizer: Tokenizer) -> dict[str, Any]:
    """Log probabilities of tokens, as chats have them."""
    decode = _decoder(tokenizer)
    return {"content": [_chat_token(one, decode) for one in logprobs]}


class TextLogprobs:
    """Log probabilities of an answer's tokens, as completions have them, piece by piece.

    Parameters
    ----------
    tokenizer
        The model's.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._decode = _decoder(tokenizer)
        self._characters = 0

    def more(self, logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
        """Those of the next tokens."""
        texts = [self._decode(one.token_id) for one in logprobs]
        begins = list(accumulate(map(len, texts), initial=self._characters))
        self._characters = begins.pop()
        return {
            "tokens": texts,
            "token_logprobs": [_finite(one.logprob) for one in logprobs],
            "top_logprobs": [
                {self._decode(token): _finite(logprob) for token, logprob in one.best} for one in logprobs
            ],
            "text_offset": begins,
        }


def _decoder(tokenizer: Tokenizer) -> Decode:
    return lambda token: tokenizer.decode([token], special=True)


def _choice(at: int, done: Completion, chat: bool, tokenizer: Tokenizer) -> dict[str, Any]:
    said = {"message": {"role": "assistant", "content": done.text, "refusal": None}} if chat else {"text": done.text}
    more: Mapping[str, Any] = {} if done.scores is None else {"scores": {str(k): v for k, v in done.scores.items()}}
    logprobs = None
    if done.logprobs is not None:
        logprobs = chat_logprobs(done.logprobs, tokenizer) if chat else TextLogprobs(tokenizer).more(done.logprobs)
    return {"index": at, **said, "logprobs": logprobs, "finish_reason": done.finish_reason, **more}


def _chat_token(one: TokenLogprob, decode: Decode) -> dict[str, Any]:
    best = [_token(token, logprob, decode) for token, logprob in one.best]
    return {**_token(one.token_id, one.logprob, decode), "top_logprobs": best}


def _token(token: int, logprob: float, decode: Decode) -> dict[str, Any]:
    text = decode(token)
    return {"token": text, "logprob": _finite(logprob), "bytes": [*text.encode("utf-8", "replace")]}


def _by_id(one: TokenLogprob, decode: Decode) -> dict[str, Any]:
    known = {one.token_id: one.logprob} | dict(one.best)
    return {
        str(token): {"logprob": _finite(logprob), "decoded_token": decode(token)} for token, logprob in known.items()
    }


def _finite(logprob: float) -> float:
    return max(logprob, LEAST)
