"""Chat messages for templates: every value is text; other values are refused by name, never converted."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from distkv_dask.errors import InvalidRequestError

TEXT_PARTS = frozenset(("text", "input_text", "output_text"))
"""Types of content parts that are text, by their names in OpenAI's two APIs."""

_PART_KEYS = frozenset(("type", "text", "cache_control"))
_ROLE = re.compile(r"[A-Za-z][\w-]*")


def plain_messages(messages: Iterable[Any]) -> list[dict[str, str]]:
    """Chat messages whose values are all text.

    The text parts of a content in parts are joined, with nothing between them. Keys without a value (None, or an empty
    list or object) are left out.

    Parameters
    ----------
    messages
        Mappings with ``role`` and ``content``, as OpenAI's API has them.

    Raises
    ------
    InvalidRequestError
        When a message is invalid or has a value that is not text: an image, a tool call, a number. The error names it.

    Examples
    --------
    >>> parts = [{"type": "text", "text": "Who "}, {"type": "text", "text": "signed?"}]
    >>> plain_messages([{"role": "user", "content": parts, "tool_calls": []}])
    [{'role': 'user', 'content': 'Who signed?'}]
    """
    return [_plain(message, f"chat message {at}") for at, message in enumerate(messages)]


def _plain(message: Any, where: str) -> dict[str, str]:
    if not (isinstance(message, Mapping) and "role" in message and "content" in message):
        raise InvalidRequestError(f"{where} needs the keys 'role' and 'content'")
    role = message["role"]
    if not isinstance(role, str) or not _ROLE.fullmatch(role):
        raise InvalidRequestError(f"{where} has the role {role!r:.100}: give a name such as 'user'")
    plain = {"role": role, "content": _content(message["content"], where)}
    for key, value in message.items():
        if key in plain or _is_nothing(value):
            continue
        if not isinstance(key, str) or not isinstance(value, str):
            raise InvalidRequestError(f"{where} has {key!r:.100} of type {type(value).__name__}: only text is answered")
        plain[key] = value
    return plain


def _content(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list | tuple) or not content:
        raise InvalidRequestError(
            f"{where} has a content of type {type(content).__name__}: give a text, or a list of text parts"
        )
    return "".join(_part(part, f"part {at} of {where}") for at, part in enumerate(content))


def _part(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, Mapping):
        raise InvalidRequestError(f"{where} is of type {type(part).__name__}: only text is answered")
    kind, text = part.get("type"), part.get("text")
    if not isinstance(kind, str) or kind not in TEXT_PARTS:
        raise InvalidRequestError(f"{where} is of type {kind!r:.100}: only text is answered")
    if not isinstance(text, str):
        raise InvalidRequestError(f"{where} has a 'text' of type {type(text).__name__}: give a text")
    for key, value in part.items():
        if key not in _PART_KEYS and not _is_nothing(value):
            raise InvalidRequestError(f"{where} has {key!r:.100} in addition to its text: only text is supported")
    return text


def _is_nothing(value: Any) -> bool:
    return value is None or (isinstance(value, list | tuple | Mapping) and not value)
