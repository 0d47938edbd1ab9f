"""Prompts on a document are those of separate requests, and all begin with the document's tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_tokenizer import LOADED, byte_tokenizer

from distkv_dask import InvalidRequestError, SourceError
from distkv_dask.client.documents.prompts import common_length, prompts_of, read_text
from distkv_dask.client.tokenizer import Tokenizer

PLAIN = byte_tokenizer(chat_template=None)
CHATS, TEXTS = Tokenizer(LOADED, len(LOADED)), Tokenizer(PLAIN, len(PLAIN))
text = st.text(min_size=1, max_size=30).filter(str.strip)
SYSTEM = {"role": "system", "content": "be brief"}


def asks(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


@given(text, text)
def test_a_text_and_a_question_are_one_message_of_the_chat_template(document: str, question: str) -> None:
    prompts = prompts_of(document, CHATS)
    prompt = prompts.prompt(question)
    assert prompt == CHATS.encode([asks(f"{document}\n\n{question}")])
    assert common_length(prompt, prompts.prefix()) >= len(prompts.prefix()) - 1  # two tokens may merge at the boundary


@given(text, text)
def test_without_a_template_the_question_stands_below_the_text(document: str, question: str) -> None:
    prompts = prompts_of(document, TEXTS)
    prompt = prompts.prompt(question)
    assert prompt == TEXTS.encode(f"{document}\n\n{question}")
    assert common_length(prompt, prompts.prefix()) >= len(prompts.prefix()) - 1


def test_messages_are_asked_with_another_message() -> None:
    messages = [SYSTEM, asks("the dog stops")]
    prompts = prompts_of(messages, CHATS)
    assert prompts.prompt("where?") == CHATS.encode([*messages, asks("where?")])
    begins = LOADED.decode(prompts.prefix())
    assert begins == "<s>system: be brief\n<s>user: the dog stops\n<s>user: "


def test_token_ids_are_asked_with_the_ids_behind_them() -> None:
    prompts = prompts_of([5, 6, 7], CHATS)
    assert prompts.prefix() == [5, 6, 7]
    assert prompts.prompt([8]) == [5, 6, 7, 8]
    assert prompts.prompt("the dog") == [5, 6, 7, *LOADED("the dog", add_special_tokens=False)["input_ids"]]


@pytest.mark.parametrize(
    ("source", "tokenizer", "wanted"),
    [
        ("the fox", CHATS, "<s>user: the fox\n\nwho?\n<s>assistant: a fox\n<s>user: jumps?\n<s>assistant: "),
        ("the fox", TEXTS, "the fox\n\nwho?\n\na fox\n\njumps?"),
        ([SYSTEM], CHATS, "<s>system: be brief\n<s>user: who?\n<s>assistant: a fox\n<s>user: jumps?\n<s>assistant: "),
    ],
)
def test_a_chat_goes_on_where_the_last_answer_ended(source: Any, tokenizer: Tokenizer, wanted: str) -> None:
    prompt = prompts_of(source, tokenizer).prompt("jumps?", [("who?", "a fox", (1, 2))])
    assert LOADED.decode(prompt) == wanted


def test_a_chat_over_token_ids_takes_the_ids_of_its_answers() -> None:
    assert prompts_of([5, 6], CHATS).prompt([9], [([7], "", (1, 2))]) == [5, 6, 7, 1, 2, 9]


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("", "empty"),
        (" \n", "empty"),
        ([], "empty"),
        (7, "not int"),
        (b"text", "not bytes"),
        ([{"role": "user"}], "keys"),
    ],
)
def test_what_cannot_be_a_document_is_said(source: Any, words: str) -> None:
    with pytest.raises(InvalidRequestError, match=words):
        prompts_of(source, CHATS).prefix()


@pytest.mark.parametrize(("question", "words"), [("", "empty"), (" ", "empty"), ([5], "ingest token ids")])
def test_what_cannot_be_a_question_is_said(question: Any, words: str) -> None:
    with pytest.raises(InvalidRequestError, match=words):
        prompts_of("the fox", CHATS).prompt(question)


def test_files_are_read_by_their_kind(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text("<p>the <b>fox</b></p>")
    (tmp_path / "b.log").write_text("jumps")
    assert read_text(tmp_path / "a.html") == "the fox"
    assert read_text(tmp_path / "b.log") == "jumps"
    with pytest.raises(SourceError, match="cannot be read"):
        read_text(tmp_path / "none.txt")
