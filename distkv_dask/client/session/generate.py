"""Several prompts answered together: submitted one by one, awaited as a whole, returned in order."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from distkv_dask.client.session.generation import Generation
from distkv_dask.completion import Completion, Timings
from distkv_dask.errors import DistKVError, EngineClosedError, InvalidRequestError, MissingProgramError, in_words
from distkv_dask.sampling import Prompt, SamplingParams

Submitted = list[Generation | Completion]
"""Running requests, and those that were refused at once."""


def submit_all(
    prompts: Sequence[Any],
    sampling: SamplingParams | Sequence[SamplingParams] | None,
    submit: Callable[[Any, SamplingParams | None], Generation],
) -> Submitted:
    """Submit prompts, or questions on a document; ``sampling`` is one for all of them or one for each.

    A prompt that cannot be submitted becomes a completion with the error. An error that concerns all prompts cancels
    those already submitted.

    Raises
    ------
    InvalidRequestError
        When there are not as many sampling parameters as prompts.
    EngineClosedError, MissingProgramError
        When no prompt can be submitted.
    """
    params = _one_for_each(sampling, len(prompts))
    submitted: Submitted = []
    try:
        for prompt, one in zip(prompts, params, strict=True):
            try:
                submitted.append(submit(prompt, one))
            except (EngineClosedError, MissingProgramError):
                raise
            except Exception as error:  # a prompt object's own code, for instance: the others are answered
                submitted.append(_failed(error))
    except BaseException:
        _cancel(submitted)
        raise
    return submitted


def _one_for_each(
    sampling: SamplingParams | Sequence[SamplingParams] | None, prompts: int
) -> Sequence[SamplingParams | None]:
    if sampling is None or isinstance(sampling, SamplingParams):
        return [sampling] * prompts
    if not isinstance(sampling, list | tuple):
        raise InvalidRequestError(f"sampling is {sampling!r:.100}, but must be SamplingParams(...) or a list of them")
    if len(sampling) != prompts:
        raise InvalidRequestError(f"{prompts} prompts, but {len(sampling)} sampling parameters: give one or as many")
    return sampling


async def wait_for_all(submitted: Submitted) -> list[Completion]:
    """Wait for all of them; if the waiting task is cancelled, so are they."""
    done: list[Completion] = []
    try:
        for one in submitted:
            if isinstance(one, Completion):
                done.append(one)
                continue
            try:
                done.append(await one)
            except DistKVError as error:
                done.append(_failed(error, one.timings))
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if task is not None and task.cancelling():
                    raise
                done.append(Completion("", (), 0, "cancelled"))  # the request, not the waiting task
    except asyncio.CancelledError:
        _cancel(submitted)
        raise
    return done


def several(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """Prompts as a list; a single prompt that is not a text could be mistaken for several and is refused.

    Raises
    ------
    InvalidRequestError
        When it is a single prompt, or not a list of prompts.
    """
    if isinstance(prompts, str):
        return [prompts]
    try:
        found = list(prompts)
    except TypeError:
        raise InvalidRequestError(f"prompts is {prompts!r:.100}, but must be a list of prompts") from None
    if found and all(isinstance(one, Mapping | int) for one in found):
        raise InvalidRequestError("these are the tokens or messages of one prompt: did you mean generate([prompt])?")
    return found  # type: ignore[return-value]


def _cancel(submitted: Submitted) -> None:
    for one in submitted:
        if isinstance(one, Generation):
            one.cancel()


def _failed(error: Exception, timings: Timings | None = None) -> Completion:
    return Completion("", (), 0, "error", in_words(error), timings or Timings())
