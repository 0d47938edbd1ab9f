"""What answers have in addition to their text: log probabilities, scores of choices and further answers, in columns."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from distkv_dask.client.batch.openai_choices import choices_of
from distkv_dask.client.batch.openai_embeddings import embeddings_of
from distkv_dask.client.tokenizer import Tokenizer
from distkv_dask.completion import Completion
from distkv_dask.logprobs import TokenLogprob
from distkv_dask.sampling import YES_NO, SamplingParams

_TOKEN = [("token", pa.string()), ("token_id", pa.int64()), ("logprob", pa.float64())]
_LOGPROBS = pa.list_(pa.struct([*_TOKEN, ("best", pa.list_(pa.struct(_TOKEN)))]))

RESPONSE = pa.field("response", pa.string())
"""Column of the answers to an OpenAI batch file: what a response has in addition to its text, as JSON."""


def detail_fields(sampling: SamplingParams, size: int) -> list[pa.Field]:
    """Columns of what is requested in addition to the answer's text; embeddings have ``size`` numbers."""
    fields = []
    if sampling.embed is not None:
        fields.append(pa.field("embedding", pa.list_(pa.float32(), size)))
    if sampling.choices is not None:
        fields.append(pa.field("scores", pa.map_(pa.string(), pa.float64())))
        if sampling.choices == YES_NO:
            fields.append(pa.field("score", pa.float64()))
    names = ("logprobs", "prompt_logprobs")
    fields += (pa.field(name, _LOGPROBS) for name in names if getattr(sampling, name) is not None)
    if sampling.n > 1:
        fields.append(pa.field("answers", pa.list_(pa.string())))
    return fields


def details_of(done: Completion, tokenizer: Tokenizer) -> dict[str, Any]:
    """Values of those columns, those that a completion has."""
    found: dict[str, Any] = {}
    if done.scores is not None:
        found["scores"] = [(str(choice), score) for choice, score in done.scores.items()]
        found["score"] = done.scores.get(YES_NO[0])
    for name, logprobs in (("logprobs", done.logprobs), ("prompt_logprobs", done.prompt_logprobs)):
        if logprobs is not None:
            found[name] = _logprobs(logprobs, tokenizer)
    if done.embedding is not None:
        found["embedding"] = done.embedding
    if done.others:
        found["answers"] = [one.text for one in done.answers]
    return found


def response_of(done: Completion, chat: bool, tokenizer: Tokenizer) -> dict[str, Any]:
    """Value of :data:`RESPONSE`, if a response has more than a text."""
    if not (done.others or done.scores) and done.logprobs is None and done.prompt_logprobs is None:
        return {}
    return {RESPONSE.name: json.dumps({"choices": choices_of([done], chat, tokenizer)})}


def embedded_response(done: Sequence[Completion], base64: bool) -> dict[str, Any]:
    """Value of :data:`RESPONSE` for the embeddings of a request's texts."""
    return {RESPONSE.name: json.dumps({"data": embeddings_of(done, base64)})}


def _logprobs(logprobs: Sequence[TokenLogprob | None], tokenizer: Tokenizer) -> list[dict[str, Any] | None]:
    def token(token_id: int, logprob: float) -> dict[str, Any]:
        return {"token": tokenizer.decode([token_id], special=True), "token_id": token_id, "logprob": logprob}

    return [
        None if one is None else {**token(one.token_id, one.logprob), "best": [token(*other) for other in one.best]}
        for one in logprobs
    ]
