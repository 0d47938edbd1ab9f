"""The content of a request, read from its body and checked before anything is submitted; the unsupported is refused."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from distkv_dask.client.batch.openai_request import COMPLETIONS, body_content
from distkv_dask.client.batch.rows import Content, Texts
from distkv_dask.client.serve.serving import Serving
from distkv_dask.client.session.request import checked
from distkv_dask.errors import InvalidRequestError
from distkv_dask.sampling import SamplingParams


@dataclass(frozen=True, slots=True)
class Asked:
    """The content of a request.

    Parameters
    ----------
    prompts
        Token ids and sampling parameters of each prompt.
    stream
        Whether answers are sent as they are generated.
    usage
        Whether a stream counts its tokens.
    model
        Name of the model in answers.
    """

    prompts: list[tuple[list[int], SamplingParams]]
    stream: bool
    usage: bool
    model: str

    @property
    def choices(self) -> int:
        """Answers to each prompt."""
        return self.prompts[0][1].n


async def read_asked(body: Mapping[str, Any], url: str, serving: Serving) -> Asked:
    """Read the body of a request to the path ``url``.

    Raises
    ------
    DistKVError
        When it asks for something unsupported; the message names it.
    """
    said = dict(body)
    model = serving.check_name(said.pop("model", None))
    stream, options = said.pop("stream", None), said.pop("stream_options", None)
    if not isinstance(stream, bool | None):
        raise InvalidRequestError(f"stream is {stream!r:.100}, but must be true or false")
    contents = [body_content(one, url) for one in each_prompt(said, url, serving.limits.open_requests)]
    usage = _usage(options, bool(stream))
    asked = Asked(await asyncio.to_thread(_checked, contents, serving, model), bool(stream), usage, model)
    check_written(asked.prompts[0][1], asked.stream)
    return asked


def each_prompt(body: Mapping[str, Any], url: str, most: int) -> list[Mapping[str, Any]]:
    """A copy of the body for each prompt; only completions may have several.

    Raises
    ------
    InvalidRequestError
        When there are more than ``most``.
    """
    prompts = body.get("prompt")
    if url != COMPLETIONS or not isinstance(prompts, list) or not all(isinstance(one, str | list) for one in prompts):
        return [body]
    if len(prompts) > most:
        raise InvalidRequestError(
            f"the request has {len(prompts)} prompts, and this server takes {most} at once: send several requests"
        )
    if any(isinstance(one, list) and not all(type(token) is int for token in one) for one in prompts):
        raise InvalidRequestError("each prompt should be one text, or a list of token ids")
    return [{**body, "prompt": one} for one in prompts] or [body]


def check_written(sampling: SamplingParams, stream: bool) -> None:
    """Refuse parameters that streams do not support.

    Raises
    ------
    InvalidRequestError
        When a parameter needs what is known only before or after the text.
    """
    for name in ("prompt_logprobs", "choices", "best_of") if stream else ():
        if getattr(sampling, name) is not None:
            raise InvalidRequestError(f"{name} is not supported in a stream: leave it out or stream")


def _checked(contents: list[Content], serving: Serving, model: str) -> list[tuple[list[int], SamplingParams]]:
    """Checks that may take long for a long prompt or a large schema; not run on the event loop."""
    found = []
    for content in contents:
        tokenizer = serving.session.tokenizer
        if content.template:
            tokenizer = tokenizer.with_variables(content.template)
        assert content.prompt is not None
        assert not isinstance(content.prompt, Texts)  # they have their own path
        ids = tokenizer.encode(content.prompt)
        sampling = serving.sampling(content.sampling, len(ids), model)
        found.append((ids, checked(sampling, len(ids), serving.session.facts.max_positions)))
    return found


def _usage(options: Any, stream: bool) -> bool:
    """Whether a stream should end with a count of tokens."""
    if options is None:
        return False
    if not stream:
        raise InvalidRequestError("stream_options are for streams: leave them out, or add stream=true")
    match options:
        case {"include_usage": bool(usage), **others} if others in ({}, {"include_obfuscation": False}):
            return usage
    raise InvalidRequestError(f"stream_options={options!r:.100} are not supported: they may have include_usage")
