"""``/v1/chat/completions``."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from distkv_dask.client.batch.openai_choices import chat_logprobs, choices_of
from distkv_dask.client.batch.openai_request import CHAT
from distkv_dask.client.serve.answers import answered
from distkv_dask.client.serve.form import usage_of
from distkv_dask.client.session.generation import Piece
from distkv_dask.client.tokenizer import Tokenizer
from distkv_dask.completion import Completion


async def chat(request: Request) -> Response:
    """Answer chat messages."""
    return await answered(request, CHAT, ChatForm)


class ChatForm:
    """A chat's answer as OpenAI writes it.

    Parameters
    ----------
    model
        Name of the model in answers.
    tokenizer
        The model's.
    """

    def __init__(self, model: str, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._about = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}

    def whole(self, done: Sequence[Completion]) -> dict[str, Any]:
        """All answers as one object."""
        choices = choices_of(done, True, self._tokenizer)
        return {**self._about, "object": "chat.completion", "choices": choices, "usage": usage_of(done)}

    def first(self, index: int) -> dict[str, Any]:
        """Says who speaks."""
        return self._chunk(index, {"role": "assistant", "content": ""})

    def piece(self, index: int, piece: Piece) -> dict[str, Any]:
        """A piece of a choice."""
        logprobs = chat_logprobs(piece.logprobs, self._tokenizer) if piece.logprobs else None
        return self._chunk(index, {"content": piece.text}, logprobs)

    def last(self, index: int, done: Completion) -> dict[str, Any]:
        """The end of a choice, with its reason."""
        return self._chunk(index, {}, None, done.finish_reason)

    def usage(self, done: Sequence[Completion]) -> dict[str, Any]:
        """The tokens of a stream."""
        return {**self._about, "object": "chat.completion.chunk", "choices": [], "usage": usage_of(done)}

    def _chunk(
        self, index: int, delta: dict[str, Any], logprobs: dict[str, Any] | None = None, reason: str | None = None
    ) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return {**self._about, "object": "chat.completion.chunk", "choices": [choice]}
