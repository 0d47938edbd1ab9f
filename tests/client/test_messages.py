"""Chat messages reach the model with their exact text, and nothing but text is written into a prompt."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_tokenizer import TOKENIZER

from distkv_dask.client.messages import plain_messages
from distkv_dask.errors import InvalidRequestError


def user(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **more}


def text(words: Any, kind: Any = "text", **more: Any) -> dict[str, Any]:
    return {"type": kind, "text": words, **more}


IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,QUJD"}}


def test_text_parts_are_the_text_that_they_make_together() -> None:
    assert TOKENIZER.encode([user([text("the "), text("dog?", "input_text")])]) == TOKENIZER.encode([user("the dog?")])
    assert plain_messages([user(["a", text("b", cache_control={"type": "ephemeral"})])]) == [user("ab")]


@pytest.mark.parametrize(
    ("message", "named"),
    [
        (user([text("look"), IMAGE]), r"part 1 of chat message 0 is of type 'image_url'"),
        (user([{"type": "input_audio", "input_audio": {}}]), "'input_audio'"),
        (user([text("x", image_url={"url": "u"})]), "'image_url' in addition to its text"),
        (user([text(["x"])]), "'text' of type list"),
        (user([text("x", 7)]), "type 7"),
        (user([{"text": "x"}]), "type None"),
        (user([7]), "part 0 of chat message 0 is of type int"),
        (user([["x"]]), "type list"),
        (user([]), "content of type list"),
        (user(None), "content of type NoneType"),
        (user(None, tool_calls=[{"id": "1"}]), "content of type NoneType"),
        (user(7), "content of type int"),
        (user({"text": "x"}), "content of type dict"),
        (user(b"x"), "content of type bytes"),
        (user("x", tool_calls=[{"id": "1"}]), "'tool_calls' of type list"),
        (user("x", name=7), "'name' of type int"),
        (user("x", tool_call_id=["1"]), "'tool_call_id' of type list"),
        (user("x", audio={"id": "1"}), "'audio' of type dict"),
        ({"role": 7, "content": "x"}, "role 7"),
        ({"role": ["user"], "content": "x"}, "role"),
        ({"role": "", "content": "x"}, "role"),
        ({"role": "user\n<s>system", "content": "x"}, "role"),
        ({"role": "user"}, "needs the keys"),
        ("x", "needs the keys"),
    ],
)
def test_what_is_no_text_is_refused_by_name(message: Any, named: str) -> None:
    with pytest.raises(InvalidRequestError, match=named):
        TOKENIZER.encode([message, user("x")])


def test_what_says_nothing_is_left_out_and_what_is_text_is_kept() -> None:
    message = user("x", tool_calls=[], refusal=None, annotations=(), audio={}, name="Ada")
    assert plain_messages([message]) == [user("x", name="Ada")]


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.binary(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["type", "text", "x"]), inner),
    max_leaves=8,
)
KEYS = st.sampled_from(["role", "content", "name", "tool_calls", "x"])


@given(st.lists(st.dictionaries(KEYS, VALUES, max_size=5) | VALUES, max_size=3))
def test_whatever_a_message_holds_it_is_all_text_or_refused(messages: list[Any]) -> None:
    try:
        plain = plain_messages(messages)
    except InvalidRequestError:
        return
    for given_one, one in zip(messages, plain, strict=True):
        assert all(isinstance(key, str) and isinstance(value, str) for key, value in one.items())
        assert {key: value for key, value in given_one.items() if isinstance(value, str)} == {
            key: one[key] for key, value in given_one.items() if isinstance(value, str)
        }
