"""``/v1/completions``."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from distkv_dask.client.batch.openai_choices import TextLogprobs, choices_of
from distkv_dask.client.batch.openai_request import COMPLETIONS
from distkv_dask.client.serve.answers import answered
from distkv_dask.client.serve.form import usage_of
from distkv_dask.client.session.generation import Piece
from distkv_dask.client.tokenizer import Tokenizer
from distkv_dask.completion import Completion


async def completions(request: Request) -> Response:
    """Continue a text, or token ids."""
    return await answered(request, COMPLETIONS, TextForm)


class TextForm:
    """A completion as OpenAI writes it.

    Parameters
    ----------
    model
        Name of the model in answers.
    tokenizer
        The model's.
    """

    def __init__(self, model: str, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._logprobs: dict[int, TextLogprobs] = {}
        self._about = {
            "id": f"cmpl-{secrets.token_hex(12)}", "object": "text_completion", "created": int(time.time()),
            "model": model,
        }  # fmt: skip

    def whole(self, done: Sequence[Completion]) -> dict[str, Any]:
        """The answers to all prompts as one object."""
        return {**self._about, "choices": choices_of(done, False, self._tokenizer), "usage": usage_of(done)}

    def first(self, index: int) -> None:
        """A choice of completions begins with its text."""

    def piece(self, index: int, piece: Piece) -> dict[str, Any]:
        """A piece of a choice."""
        logprobs = None
        if piece.logprobs:
            logprobs = self._logprobs.setdefault(index, TextLogprobs(self._tokenizer)).more(piece.logprobs)
        return self._chunk(index, piece.text, logprobs, None)

    def last(self, index: int, done: Completion) -> dict[str, Any]:
        """The end of a choice, with its reason."""
        return self._chunk(index, "", None, done.finish_reason)

    def usage(self, done: Sequence[Completion]) -> dict[str, Any]:
        """The tokens of a stream."""
        return {**self._about, "choices": [], "usage": usage_of(done)}

    def _chunk(self, index: int, text: str, logprobs: dict[str, Any] | None, reason: str | None) -> dict[str, Any]:
        choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}
        return {**self._about, "choices": [choice]}
