"""The choices of an answer in OpenAI's format: one for each answer to the prompt, with log probabilities if wanted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from distkv_dask.client.tokenizer import Tokenizer
from distkv_dask.completion import Completion
from distkv_dask.logprobs import TokenLogprob

LEAST = -9999.0
"""What stands for the logarithm of 0, for which JSON has no number; as in OpenAI's API."""

Decode = Callable[[int], str]


def choices_of(done: Completion, chat: bool, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """The choices of a response.

    Parameters
    ----------
    done
        What was answered.
    chat
        Whether it answers chat messages.
    tokenizer
        The model's.
    """

    def decode(token: int) -> str:
        return tokenizer.decode([token], special=True)

    choices = [_choice(at, one, chat, decode) for at, one in enumerate(done.answers)]
    if done.prompt_logprobs is not None:
        scored = [None if one is None else _by_id(one, decode) for one in done.prompt_logprobs]
        choices[0]["prompt_logprobs"] = scored
    return choices


def _logprobs(logprobs: Sequence[TokenLogprob] | None, chat: bool, decode: Decode) -> dict[str, Any] | None:
    """Log probabilities of an answer's tokens, as chats or completions have them."""
    if logprobs is None:
        return None
    if chat:
        return {"content": [_chat_token(one, decode) for one in logprobs]}
    texts = [decode(one.token_id) for one in logprobs]
    best = [{decode(token): _finite(logprob) for token, logprob in one.best} for one in logprobs]
    return {
        "tokens": texts,
        "token_logprobs": [_finite(one.logprob) for one in logprobs],
        "top_logprobs": best,
        "text_offset": [sum(map(len, texts[:at])) for at in range(len(texts))],
    }


def _choice(at: int, done: Completion, chat: bool, decode: Decode) -> dict[str, Any]:
    said = {"message": {"role": "assistant", "content": done.text, "refusal": None}} if chat else {"text": done.text}
    more: Mapping[str, Any] = {} if done.scores is None else {"scores": {str(k): v for k, v in done.scores.items()}}
    logprobs = _logprobs(done.logprobs, chat, decode)
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
