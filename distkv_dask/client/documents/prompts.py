"""How a document and a question become a prompt, and the common prefix of all prompts on a document."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Self

from distkv_dask.client.documents.extract import TextReader, read_file
from distkv_dask.client.documents.readers import Reader, check_support, checked_reader
from distkv_dask.client.tokenizer import Tokenizer
from distkv_dask.errors import InvalidRequestError, SourceError
from distkv_dask.sampling import Message, Prompt

Question = str | Sequence[int]
Turn = tuple[Question, str, tuple[int, ...]]
"""A question of a chat, and its answer as text and as token ids."""
PROBES = "What is it about?", "Is there more?"
"""Two questions without a common prefix or suffix: their prompts' common prefix is that of all prompts."""


class DocumentPrompts(Protocol):
    """Prompts on one document."""

    def prefix(self) -> list[int]:
        """The tokens that every prompt begins with."""

    def prompt(self, question: Question, turns: Sequence[Turn] = ()) -> list[int]:
        """The prompt of a question, after earlier turns of a chat.

        Raises
        ------
        InvalidRequestError
            When the question is empty or of another type, or the model's chat template refuses it.
        """


class MessagePrompts:
    """A document within chat messages; or a text, followed by the first question in one message.

    Parameters
    ----------
    messages
        Chat messages before the question, or the text.
    tokenizer
        The model's, with a chat template.
    """

    def __init__(self, messages: str | Sequence[Message], tokenizer: Tokenizer) -> None:
        self._text = messages if isinstance(messages, str) else None
        self._messages = [] if isinstance(messages, str) else list(messages)
        self._tokenizer = tokenizer

    def prefix(self) -> list[int]:
        """The tokens that every prompt begins with."""
        one, other = map(self.prompt, PROBES)
        return one[: common_length(one, other)]

    def prompt(self, question: Question, turns: Sequence[Turn] = ()) -> list[int]:
        """The chat template over messages, turns and question."""
        texts = [_text(one) for one in (*(asked for asked, _, _ in turns), question)]
        if self._text is not None:
            texts[0] = f"{self._text}\n\n{texts[0]}"
        messages = list(self._messages)
        for text, (_, answer, _) in zip(texts, turns, strict=False):
            messages += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
        return self._tokenizer.encode([*messages, {"role": "user", "content": texts[-1]}])


class TextPrompts:
    """A text with the question below it, for models without a chat template."""

    def __init__(self, text: str, tokenizer: Tokenizer) -> None:
        self._text = text
        self._tokenizer = tokenizer

    def prefix(self) -> list[int]:
        """The tokens that every prompt begins with."""
        one, other = map(self.prompt, PROBES)
        return one[: common_length(one, other)]

    def prompt(self, question: Question, turns: Sequence[Turn] = ()) -> list[int]:
        """Text, turns and question, with an empty line between them."""
        said = [piece for asked, answer, _ in turns for piece in (_text(asked), answer)]
        return prompt_ids("\n\n".join([self._text, *said, _text(question)]), self._tokenizer)


class TokenPrompts:
    """A document of token ids; a question's ids follow."""

    def __init__(self, ids: Sequence[int], tokenizer: Tokenizer) -> None:
        self._ids = list(ids)
        self._tokenizer = tokenizer

    def prefix(self) -> list[int]:
        """The document's ids."""
        return self._ids

    def prompt(self, question: Question, turns: Sequence[Turn] = ()) -> list[int]:
        """Ids of document, turns and question, concatenated."""
        ids = list(self._ids)
        for asked, _, answer in turns:
            ids += [*self._tokenizer.encode_more(asked), *answer]
        return ids + self._tokenizer.encode_more(question)


@dataclass(frozen=True, slots=True)
class DocumentText:
    """A document's source, how questions on it are asked, and the token ids that all their prompts begin with."""

    source: Prompt
    prompts: DocumentPrompts
    ids: list[int]

    @classmethod
    def of(cls, source: Prompt, tokenizer: Tokenizer) -> Self:
        """Read a source; takes a while for long ones. Raises as :func:`prompts_of` does."""
        prompts = prompts_of(source, tokenizer)
        return cls(source, prompts, prompts.prefix())


def prompts_of(source: Prompt, tokenizer: Tokenizer) -> DocumentPrompts:
    """Choose how questions on a document are asked.

    Parameters
    ----------
    source
        A text, token ids, or chat messages.
    tokenizer
        The model's.

    Raises
    ------
    InvalidRequestError
        When it is empty, of another type, or needs a tokenizer or chat template that the model does not have.
    """
    if isinstance(source, str):
        if not source.strip():
            raise InvalidRequestError("the document is empty: give a text that is not empty")
        chats = tokenizer.has_chat_template
        return MessagePrompts(source, tokenizer) if chats else TextPrompts(source, tokenizer)
    ids = tokenizer.encode(source)  # raises for an invalid document
    if any(isinstance(one, Mapping) for one in source):
        return MessagePrompts(source, tokenizer)  # type: ignore[arg-type]
    return TokenPrompts(ids, tokenizer)


def prompt_ids(text: str, tokenizer: Tokenizer) -> list[int]:
    """Token ids of a prompt: a user's message if the model has a chat template, otherwise the plain text."""
    return tokenizer.encode([{"role": "user", "content": text}] if tokenizer.has_chat_template else text)


def read_text(path: Path, reader: Reader = "auto") -> str:
    """The text of a document; files of other endings are read as plain text.

    Raises
    ------
    SourceError, InvalidRequestError, MissingProgramError
        It cannot be read, by this reader, or before something is installed.
    """
    suffix = path.suffix.lower()
    checked_reader(reader)
    check_support([suffix], reader)
    try:
        return TextReader(reader).text(suffix, read_file(path))
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error}") from error


def common_length(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the common prefix.

    Examples
    --------
    >>> common_length([1, 2, 3], [1, 2, 4, 5])
    2
    """
    for at, (mine, its) in enumerate(zip(one, other, strict=False)):
        if mine != its:
            return at
    return min(len(one), len(other))


def _text(question: Question) -> str:
    if not isinstance(question, str):
        raise InvalidRequestError(
            "this document is a text, and so are questions on it; ingest token ids to ask with ids"
        )
    if not question.strip():
        raise InvalidRequestError("the question is empty")
    return question
