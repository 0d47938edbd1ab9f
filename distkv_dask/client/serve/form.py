"""Formats of answers: OpenAI has different objects for chats and for completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from distkv_dask.client.session.generation import Piece
from distkv_dask.completion import Completion


class Form(Protocol):
    """The format of one endpoint's answers. ``index`` is the number of a choice, over all prompts of a request."""

    def whole(self, done: Sequence[Completion]) -> dict[str, Any]:
        """The answers to all prompts as one object."""

    def first(self, index: int) -> dict[str, Any] | None:
        """The first event of a choice in a stream, if there is one."""

    def piece(self, index: int, piece: Piece) -> dict[str, Any]:
        """A piece of a choice; ``piece.logprobs`` are those of its tokens."""

    def last(self, index: int, done: Completion) -> dict[str, Any]:
        """The end of a choice, with its reason."""

    def usage(self, done: Sequence[Completion]) -> dict[str, Any]:
        """Token counts of a stream, sent after its end."""


def usage_of(done: Sequence[Completion]) -> dict[str, Any]:
    """OpenAI's count of tokens, over all prompts."""
    prompts = sum(one.prompt_tokens for one in done)
    new = sum(len(answer.token_ids) for one in done for answer in one.answers)
    return {
        "prompt_tokens": prompts,
        "completion_tokens": new,
        "total_tokens": prompts + new,
        "prompt_tokens_details": {"cached_tokens": sum(one.reused_tokens for one in done)},
    }
