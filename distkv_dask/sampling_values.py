"""Checks of single values of sampling parameters, which bring them to their declared types.

Each raises :class:`InvalidRequestError` for a value outside its range; the message has the ``name`` of the parameter.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real

from distkv_dask.errors import InvalidRequestError
from distkv_dask.texts import checked_text


def refusal(name: str, value: object, allowed: str) -> InvalidRequestError:
    """The error for a value that is not allowed."""
    return InvalidRequestError(f"{name} is {value!r}, but must be {allowed}.")


def whole(name: str, value: object, low: int, high: int | None = None) -> int:
    """A whole number within limits."""
    if not isinstance(value, bool) and isinstance(value, Integral):
        number = int(value)
        if low <= number and (high is None or number <= high):
            return number
    limits = f"of at least {low}" if high is None else f"from {low} to {high}"
    raise refusal(name, value, f"a whole number {limits}")


def real(name: str, value: object, limits: str, within: Callable[[float], bool]) -> float:
    """A finite number for which ``within`` holds; ``limits`` says that in words."""
    try:
        number = float(value) if not isinstance(value, bool) and isinstance(value, Real) else math.nan
    except OverflowError:  # a whole number beyond any float
        number = math.inf
    if math.isfinite(number) and within(number):
        return number
    raise refusal(name, value, f"a finite number {limits}")


def schema_text(value: object) -> str:
    """A JSON schema as JSON."""
    try:
        read = json.loads(value) if isinstance(value, str) else value
        if isinstance(read, Mapping):
            return json.dumps(dict(read))
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequestError(f"schema cannot be read as JSON: {error}") from error
    raise refusal("schema", value, "a JSON schema: a dict, or a JSON object as text")


def text_value(name: str, value: object) -> str:
    """A text that is not empty."""
    if isinstance(value, str) and value:
        return checked_text(value, name)
    raise refusal(name, value, "a text that is not empty")


def place(name: str, value: object) -> str:
    """An absolute path: other processes that read it have other working directories."""
    found = text_value(name, os.fspath(value) if isinstance(value, os.PathLike) else value)
    return os.path.abspath(os.path.expanduser(found))


def choice_values(value: object) -> tuple[str | tuple[int, ...], ...]:
    """Choices: texts or token ids, all different."""
    if isinstance(value, str | bytes) or not isinstance(value, Sequence) or not value:
        raise refusal("choices", value, "a list of texts, or of lists of token ids")
    found: list[str | tuple[int, ...]] = []
    for one in value:
        if isinstance(one, str) and one:
            found.append(checked_text(one, "a choice"))
        elif isinstance(one, list | tuple) and one:
            found.append(tuple(whole("a choice's token", token, low=0) for token in one))
        else:
            raise InvalidRequestError(f"a choice is {one!r:.100}, but must be a text that is not empty, or token ids")
    if len(set(found)) < len(found):
        twice = next(one for one in found if found.count(one) > 1)
        raise InvalidRequestError(f"the choice {twice!r:.100} occurs twice: give each once")
    return tuple(found)


def strings(name: str, value: object) -> tuple[str, ...]:
    """One string or several, none of them empty."""
    strings = (value,) if isinstance(value, str) else value
    if isinstance(strings, list | tuple) and all(isinstance(string, str) and string for string in strings):
        return tuple(checked_text(string, name) for string in strings)
    raise refusal(name, value, "a string that is not empty, or a list of such strings")
