"""A prompt that cannot be submitted does not lose the answers of the others in its batch."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from distkv_dask import EngineClosedError, InvalidRequestError, SamplingParams
from distkv_dask.client.session.generate import submit_all, wait_for_all
from distkv_dask.client.session.generation import Generation
from distkv_dask.completion import Completion
from distkv_dask.errors import MissingProgramError


class Submitter:
    """Answers prompts at once, but raises those that are exceptions."""

    def __init__(self) -> None:
        self.cancelled = 0

    def __call__(self, prompt: Any, sampling: SamplingParams | None) -> Generation:
        if isinstance(prompt, BaseException):
            raise prompt
        generation = Generation(self._cancel)
        generation.add_done_callback(lambda _: None)
        if prompt != "waits":
            generation.set_result(Completion(prompt, (), 1, "stop"))
        return generation

    def _cancel(self) -> None:
        self.cancelled += 1


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (InvalidRequestError("half a pair"), "half a pair"),
        (TypeError("not a str"), "TypeError: not a str"),
        (RecursionError("too deep"), "RecursionError"),
    ],
)
def test_whatever_one_prompt_raises_is_that_prompts_error(error: Exception, words: str) -> None:
    submit = Submitter()
    done = asyncio.run(wait_for_all(submit_all(["a", error, "b"], None, submit)))
    assert [one.text for one in done] == ["a", "", "b"]
    assert [one.finish_reason for one in done] == ["stop", "error", "stop"]
    assert words in (done[1].error or "")
    assert submit.cancelled == 0


@pytest.mark.parametrize("error", [EngineClosedError("x"), MissingProgramError("x"), KeyboardInterrupt()])
def test_what_ends_all_prompts_leaves_none_under_way(error: BaseException) -> None:
    submit = Submitter()
    with pytest.raises(type(error)):
        submit_all(["waits", "waits", error, "waits"], None, submit)
    assert submit.cancelled == 2


@pytest.mark.parametrize("sampling", [7, "x", {}, iter(())])
def test_sampling_of_another_type_is_refused(sampling: Any) -> None:
    submit: Callable[..., Generation] = Submitter()
    with pytest.raises(InvalidRequestError, match="sampling is"):
        submit_all(["a"], sampling, submit)
