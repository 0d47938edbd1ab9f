"""Answers that are JSON of a given schema by construction: what client and workers both know of it.

The schema becomes a grammar of llguidance (https://github.com/guidance-ai/llguidance; extra: ``schema``), the library
that vLLM and others use for this. Workers follow it token by token: :mod:`distkv_dask.worker.model.structured`.
"""

from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec

from distkv_dask.errors import InvalidRequestError, MissingProgramError


@lru_cache(maxsize=64)
def grammar_of(schema: str) -> str:
    """Return llguidance's grammar of a JSON schema.

    Parameters
    ----------
    schema
        A JSON schema, as JSON.

    Raises
    ------
    MissingProgramError
        When llguidance is not installed.
    InvalidRequestError
        When the schema is none, or uses what llguidance does not know; the message says what.
    """
    if find_spec("llguidance") is None:
        raise MissingProgramError("answers of a JSON schema need llguidance: pip install 'distkv-dask[schema]'")
    from llguidance import LLMatcher

    # On one line, as Python writes JSON: with free white space, small models write line breaks without an end.
    try:
        grammar: str = LLMatcher.grammar_from_json_schema(
            schema, defaults={"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
        )
        failed, messages = LLMatcher.validate_grammar_with_warnings(grammar)
    except ValueError as error:  # nested too deeply, for instance
        raise InvalidRequestError(f"the JSON schema cannot be followed: {error}") from error
    if failed:
        raise InvalidRequestError(f"the JSON schema cannot be followed: {messages[0]}")
    return grammar
