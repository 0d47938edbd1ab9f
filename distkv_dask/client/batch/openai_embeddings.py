"""Embeddings in OpenAI's format: the texts of a request, and the response."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any

from distkv_dask.client.batch.rows import Content, Texts
from distkv_dask.client.tokenizer import is_one_text
from distkv_dask.completion import Completion
from distkv_dask.errors import DistKVError, InvalidRequestError
from distkv_dask.sampling import Prompt

EMBEDDINGS = "/v1/embeddings"

_READ = {"input", "encoding_format", "embed", "normalize"}

_WITHOUT_EFFECT = {"model", "user"}


def embedding_content(body: Mapping[str, Any]) -> Content:
    """The content of the body of a request for embeddings.

    ``embed`` ("mean", the default, or "last") and ``normalize`` are our additions, as in
    :class:`~distkv_dask.sampling.SamplingParams`.

    Raises
    ------
    InvalidRequestError
        When it asks for something unsupported; the message names it.
    """
    for field, value in body.items():
        if value is not None and field not in _READ and field not in _WITHOUT_EFFECT:
            raise InvalidRequestError(f"{field}={value!r:.100} is not supported")
    written = body.get("encoding_format") or "float"
    if written not in ("float", "base64"):
        raise InvalidRequestError(f'encoding_format is {written!r:.100}, but must be "float" or "base64"')
    embed = "mean" if body.get("embed") is None else body["embed"]
    said = {"embed": embed, "normalize": body.get("normalize")}
    return Content({}, Texts(_texts(body.get("input")), written == "base64"), said)


def _texts(given: Any) -> tuple[Prompt, ...]:
    """The texts of a request: one or several, each as text or as token ids."""
    if is_one_text(given):
        return (given,)
    if isinstance(given, list) and given and all(map(is_one_text, given)):
        return tuple(given)
    raise InvalidRequestError("input should be a text or a list of token ids, or a list of those that is not empty")


def embeddings_of(done: Sequence[Completion], base64_: bool) -> list[dict[str, Any]]:
    """The embeddings of a response.

    Parameters
    ----------
    done
        The completion of each text.
    base64_
        Whether they are written as base64 of float32, which OpenAI's own client requests.
    """
    return [{"object": "embedding", "index": at, "embedding": _written(one, base64_)} for at, one in enumerate(done)]


def _written(done: Completion, base64_: bool) -> str | list[float]:
    if (numbers := done.embedding) is None:
        raise DistKVError("a text has no embedding; this is a fault of the engine, please report it")
    if base64_:
        return base64.b64encode(numbers.astype("<f4").tobytes()).decode()
    found: list[float] = numbers.tolist()
    return found
