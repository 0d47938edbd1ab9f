"""``/v1/completions``."""

from __future__ import annotations

import secrets
import time
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from distkv_dask.client.batch.openai_choices import choices_of
from distkv_dask.client.batch.openai_request import COMPLETIONS
from distkv_dask.client.serve.answers import answered, usage_of
from distkv_dask.client.serve.serving import serving_of
from distkv_dask.client.tokenizer import Tokenizer
from distkv_dask.completion import Completion


async def completions(request: Request) -> Response:
    """Continue a text, or token ids."""
    serving = serving_of(request)
    return await answered(request, COMPLETIONS, TextForm(serving.names[0], serving.session.tokenizer))


class TextForm:
    """A completion as OpenAI writes it.

    Parameters
    ----------
    model
        The name that answers give.
    tokenizer
        The model's.
    """

    def __init__(self, model: str, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._about = {
            "id": f"cmpl-{secrets.token_hex(12)}", "object": "text_completion", "created": int(time.time()),
            "model": model,
        }  # fmt: skip

    def whole(self, done: Completion) -> dict[str, Any]:
        """An answer as one object."""
        return {**self._about, "choices": choices_of(done, False, self._tokenizer), "usage": usage_of(done)}

    def first(self) -> None:
        """A stream of completions begins with its text."""

    def piece(self, text: str) -> dict[str, Any]:
        """A piece of a stream."""
        return self._chunk(text, None)

    def last(self, done: Completion) -> dict[str, Any]:
        """The end of a stream, with its reason."""
        return self._chunk("", done.finish_reason)

    def usage(self, done: Completion) -> dict[str, Any]:
        """The tokens of a stream."""
        return {**self._about, "choices": [], "usage": usage_of(done)}

    def _chunk(self, text: str, reason: str | None) -> dict[str, Any]:
        return {**self._about, "choices": [{"index": 0, "text": text, "logprobs": None, "finish_reason": reason}]}
