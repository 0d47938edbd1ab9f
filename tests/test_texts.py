"""Texts are checked in one place, and completely: invalid ones are refused, or repaired if they come from files."""

from __future__ import annotations

import json
from typing import Any

import pytest
from _texts import any_text
from hypothesis import given

from distkv_dask import InvalidRequestError, SamplingParams
from distkv_dask.texts import LONGEST_TEXT, checked_name, checked_text, well_formed

HALF = "a \ud83d b"


@given(any_text)
def test_a_text_is_refused_exactly_when_utf8_cannot_hold_it(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        with pytest.raises(InvalidRequestError, match=f"character {error.start}:"):
            checked_text(text, "the prompt")
    else:
        assert checked_text(text, "the prompt") == text


@given(any_text)
def test_what_a_file_says_becomes_text_and_whole_text_stays(text: str) -> None:
    mended = well_formed(text)
    assert mended.encode().decode() == mended
    assert mended.replace("\ufffd", "") == well_formed(
        "".join(character for character in text.encode("utf-16", "surrogatepass").decode("utf-16", "ignore"))
    ).replace("\ufffd", "")


def test_pairs_in_files_are_joined_and_halves_replaced() -> None:
    assert well_formed("\ud83d\ude00\ud83d") == "\N{GRINNING FACE}\ufffd"


def test_a_text_longer_than_any_window_is_refused_before_it_is_encoded() -> None:
    class Long(str):
        def __len__(self) -> int:
            return LONGEST_TEXT + 1

    with pytest.raises(InvalidRequestError, match="split it"):
        checked_text(Long("x"), "the prompt")


@pytest.mark.parametrize("name", ["", " ", "a\nb", "a\0b", HALF, "\x1b[31m", "x" * 201, 7, None, b"x", "a\u2028b"])
def test_a_name_that_no_page_can_show_is_refused(name: Any) -> None:
    with pytest.raises(InvalidRequestError, match="name"):
        checked_name(name, "the document's name")


@pytest.mark.parametrize("name", ["report", "r\xe9sum\xe9 2024.pdf", "\N{GRINNING FACE}", "a" * 200, "<b>&"])
def test_other_names_stay(name: str) -> None:
    assert checked_name(name, "the document's name") == name


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("stop", HALF, "half a surrogate pair"),
        ("stop", ("x", HALF), "half a surrogate pair"),
        ("schema", "[" * 100_000, "schema"),
        ("schema", "{" * 100_000, "schema"),
    ],
)
def test_other_texts_of_a_request_are_checked_too(field: str, value: Any, words: str) -> None:
    with pytest.raises(InvalidRequestError, match=words):
        SamplingParams(**{field: value})


def test_a_schema_deeper_than_python_goes_is_refused() -> None:
    schema: dict[str, Any] = {}
    for _ in range(5000):
        schema = {"properties": {"a": schema}}
    with pytest.raises(InvalidRequestError, match="schema"):
        SamplingParams(schema=schema)
    with pytest.raises(InvalidRequestError, match="schema"):
        SamplingParams(schema=json.dumps(HALF))
