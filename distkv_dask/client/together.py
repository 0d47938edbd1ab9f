"""Several prompts answered together: submitted one by one, waited for as a whole, answered in their order."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from distkv_dask.client.generation import Generation
from distkv_dask.errors import DistKVError, InvalidRequestError
from distkv_dask.types import Completion, Prompt, SamplingParams, Timings

Submitted = list[Generation | Completion]
"""Requests under way, and those that were refused at once."""


def submit_all(
    prompts: Sequence[Any],
    sampling: SamplingParams | Sequence[SamplingParams] | None,
    submit: Callable[[Any, SamplingParams | None], Generation],
) -> Submitted:
    """Submit prompts, or questions on a document; ``sampling`` is one for all of them or one for each.

    Raises
    ------
    InvalidRequestError
        When there are not as many sampling parameters as prompts.
    """
    params = [sampling] * len(prompts) if sampling is None or isinstance(sampling, SamplingParams) else list(sampling)
    if len(params) != len(prompts):
        raise InvalidRequestError(f"{len(prompts)} prompts, but {len(params)} sampling parameters: give one or as many")
    submitted: Submitted = []
    for prompt, one in zip(prompts, params, strict=True):
        try:
            submitted.append(submit(prompt, one))
        except InvalidRequestError as error:
            submitted.append(_failed(error))
    return submitted


async def wait_for_all(submitted: Submitted) -> list[Completion]:
    """Wait for all of them; who is cancelled meanwhile cancels them."""
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
                done.append(Completion("", (), 0, "cancelled"))  # the request was, not who waits for it
    except asyncio.CancelledError:
        for one in submitted:
            if isinstance(one, Generation):
                one.cancel()
        raise
    return done


def several(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """Prompts as a list; one alone that is not a text could be mistaken for several, so it is refused.

    Raises
    ------
    InvalidRequestError
        When it is one, or nothing of the kind.
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


def _failed(error: DistKVError, timings: Timings | None = None) -> Completion:
    return Completion("", (), 0, "error", str(error), timings or Timings())
