"""Answers that follow a JSON schema, a regular expression or a grammar by construction: what client and workers know.

Each becomes a grammar of llguidance (https://github.com/guidance-ai/llguidance; extra: ``schema``), the library that
vLLM and others use for this. Workers follow it token by token: :mod:`distkv_dask.worker.model.structured`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from importlib.util import find_spec

from distkv_dask.errors import InvalidRequestError, MissingProgramError
from distkv_dask.sampling import Form


@lru_cache(maxsize=64)
def grammar_of(form: Form) -> str:
    """Return llguidance's grammar of the form of an answer.

    Raises
    ------
    MissingProgramError
        When llguidance is not installed.
    InvalidRequestError
        When no text has this form, or it uses what llguidance does not know; the message says what.
    """
    check_installed(f"answers that follow {form.name}")
    from llguidance import LLMatcher

    with no_panic(form):
        try:
            grammar = _grammar(form)
            failed, messages = LLMatcher.validate_grammar_with_warnings(grammar)
        except ValueError as error:  # nested too deeply, for instance
            raise InvalidRequestError(f"{form.name} cannot be followed: {error}") from error
        if failed:
            raise InvalidRequestError(f"{form.name} cannot be followed: {messages[0]}")
        if form.kind != "schema" and _is_of_nothing(grammar):
            raise InvalidRequestError(f"{form.name} cannot be followed: no text matches it")
    return grammar


def check_installed(what: str) -> None:
    """Raise :class:`~distkv_dask.errors.MissingProgramError` if llguidance, which ``what`` needs, is not installed."""
    if find_spec("llguidance") is None:
        raise MissingProgramError(f"{what} need llguidance: pip install 'distkv-dask[schema]'")


def _grammar(form: Form) -> str:
    from llguidance import LLMatcher

    if form.kind == "regex":
        return LLMatcher.grammar_from_regex(form.text)
    if form.kind == "grammar":
        return LLMatcher.grammar_from_lark(form.text)
    # On one line, as Python writes JSON: with free white space, small models write line breaks without an end.
    return LLMatcher.grammar_from_json_schema(
        form.text, defaults={"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
    )


def _is_of_nothing(grammar: str) -> bool:
    """Whether no text matches a grammar; of one with special tokens, which only a model has, that is not known."""
    from llguidance import LLMatcher, LLTokenizer

    matcher = LLMatcher(LLTokenizer("byte"), grammar, log_level=0)
    if matcher.is_error():
        return False
    matcher.compute_bitmask()
    return bool(matcher.is_error())


@contextmanager
def no_panic(form: Form) -> Iterator[None]:
    """Turn a panic of llguidance, which is not an ``Exception``, into an error about the given form."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise InvalidRequestError(f"{form.name} cannot be followed: llguidance gave up on it; simplify it") from None
