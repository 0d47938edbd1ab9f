"""One request in OpenAI's format, translated to our parameters; unsupported fields are refused by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from distkv_dask.client.batch.openai_embeddings import EMBEDDINGS, embedding_content
from distkv_dask.client.batch.rows import Content
from distkv_dask.client.messages import plain_messages
from distkv_dask.errors import InvalidRequestError
from distkv_dask.sampling import Prompt

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"

PATHS = CHAT, COMPLETIONS, EMBEDDINGS
"""Paths of requests in batch files."""

_SAMPLING = {
    "max_tokens": "max_new_tokens", "max_completion_tokens": "max_new_tokens", "temperature": "temperature",
    "top_p": "top_p", "top_k": "top_k", "min_p": "min_p", "repetition_penalty": "repetition_penalty", "seed": "seed",
    "stop": "stop", "ignore_eos": "ignore_eos", "n": "n", "best_of": "best_of", "prompt_logprobs": "prompt_logprobs",
}  # fmt: skip
"""Fields of OpenAI's API, and of vLLM's beyond it -> ours."""

_READ = {
    "messages", "prompt", "response_format", "structured_outputs", "chat_template_kwargs", "logprobs", "top_logprobs",
}  # fmt: skip

_WITHOUT_EFFECT = {
    "model", "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key",
    "prompt_cache_retention", "parallel_tool_calls", "prediction", "stream_options",
}  # fmt: skip
"""Fields that change nothing in an answer."""


def _is(*allowed: Any) -> Callable[[Any], bool]:
    return lambda value: any(type(value) is type(one) and value == one for one in allowed)


def _zero(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == 0


_HARMLESS: Mapping[str, Callable[[Any], bool]] = {
    "stream": _is(False), "echo": _is(False), "frequency_penalty": _zero, "presence_penalty": _zero,
    "min_tokens": _zero,
    "logit_bias": _is({}), "tools": _is([]), "functions": _is([]), "suffix": _is(""), "modalities": _is(["text"]),
    "tool_choice": _is("none", "auto"), "function_call": _is("none", "auto"), "use_beam_search": _is(False),
    "skip_special_tokens": _is(True), "add_generation_prompt": _is(True), "length_penalty": _is(1, 1.0),
}  # fmt: skip
"""Fields that are accepted with their default only: without tools, "auto" calls none."""


def content_of(record: Mapping[str, Any]) -> Content:
    """The request in a line of a batch file.

    Raises
    ------
    InvalidRequestError
        When it is not a request, or asks for something unsupported; the message names it.
    """
    body, url, method = record.get("body"), record.get("url"), record.get("method")
    if not isinstance(name := record.get("custom_id"), str):
        raise InvalidRequestError(f"custom_id is {name!r:.100}, but it must be a text")
    if not isinstance(body, Mapping):
        raise InvalidRequestError(f"a request needs a body (object), not {type(body).__name__}")
    if url not in PATHS:
        raise InvalidRequestError(f"url is {url!r:.100}, but only {' and '.join(PATHS)} are answered")
    if method is not None and not (isinstance(method, str) and method.upper() == "POST"):
        raise InvalidRequestError(f"method is {method!r:.100}, but requests are POST")
    return embedding_content(body) if url == EMBEDDINGS else body_content(body, url)


def body_content(body: Mapping[str, Any], url: str) -> Content:
    """The content of a request's body to a path of OpenAI's API; raises as :func:`content_of` does."""
    for field, value in body.items():
        if value is None or field in _SAMPLING or field in _READ or field in _WITHOUT_EFFECT:
            continue
        if field not in _HARMLESS or not _HARMLESS[field](value):
            raise InvalidRequestError(f"{field}={value!r:.100} is not supported")
    return Content({}, _prompt(body, url), _sampling(body) | _logprobs(body, url), _template(body, url))


def _sampling(body: Mapping[str, Any]) -> dict[str, Any]:
    sampling: dict[str, Any] = {}
    for field, ours in _SAMPLING.items():
        if (value := body.get(field)) is None or (field in ("n", "best_of") and _is(1)(value)):
            continue
        if field == "top_k" and _is(-1)(value):  # "all" is -1 for others, 0 for us
            value = 0
        if ours in sampling and sampling[ours] != value:
            raise InvalidRequestError("max_tokens and max_completion_tokens differ: give one of them")
        sampling[ours] = value
    match body.get("response_format"):
        case None | {"type": "text"}:
            pass
        case {"type": "json_schema", "json_schema": {"schema": dict(schema)}}:
            sampling["schema"] = schema
        case {"type": "json_object"}:
            sampling["schema"] = {"type": "object"}
        case other:
            raise InvalidRequestError(f"response_format={other!r:.100} is not supported")
    return sampling | _structured(body.get("structured_outputs"))


def _logprobs(body: Mapping[str, Any], url: str) -> dict[str, Any]:
    """Chats ask with a flag and a number, completions with a number."""
    asked, most = body.get("logprobs"), body.get("top_logprobs")
    if url == COMPLETIONS:
        if most is not None:
            raise InvalidRequestError("top_logprobs is for chats: completions have the number in logprobs")
        return {} if asked is None or asked is False else {"logprobs": asked}
    if asked is not None and not isinstance(asked, bool):
        raise InvalidRequestError(f"logprobs is {asked!r:.100}, but chats have true or false there, and top_logprobs")
    if not asked and not _zero(most or 0):
        raise InvalidRequestError("top_logprobs needs logprobs=true")
    return {"logprobs": most or 0} if asked else {}


def _structured(given: Any) -> dict[str, Any]:
    """A field of vLLM for constraints other than JSON."""
    match given:
        case None:
            return {}
        case {"json": dict(schema) | str(schema), **others} if not others:
            return {"schema": schema}
        case {"regex": str(text), **others} if not others:
            return {"regex": text}
        case {"grammar": str(text), **others} if not others:
            return {"grammar": text}
        case {"choice": list(choices), **others} if not others:
            return {"choices": choices}
    raise InvalidRequestError(f"structured_outputs={given!r:.100} is not supported")


def _prompt(body: Mapping[str, Any], url: str) -> Prompt:
    prompt, messages = body.get("prompt"), body.get("messages")
    if url == CHAT:
        if prompt is not None:
            raise InvalidRequestError("a chat request has messages instead of a prompt")
        if not isinstance(messages, list) or not messages:
            raise InvalidRequestError(f"messages should be a list of chat messages, not {type(messages).__name__}")
        return plain_messages(messages)
    if messages is not None:
        raise InvalidRequestError("a completion request has a prompt instead of messages")
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
        prompt = prompt[0]
    if isinstance(prompt, str) or (isinstance(prompt, list) and all(type(token) is int for token in prompt)):
        return prompt
    raise InvalidRequestError("prompt should be one text, or a list of token ids")


def _template(body: Mapping[str, Any], url: str) -> Mapping[str, Any]:
    given = body.get("chat_template_kwargs") or {}
    if not isinstance(given, Mapping) or (given and url != CHAT):
        raise InvalidRequestError("chat_template_kwargs should be an object, and only chats may have it")
    return given
