"""Prompts to token ids, and generated tokens to text as they arrive."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from inspect import signature
from operator import index
from typing import Any, Self

from distkv_dask.client.control_tokens import ControlTokens, Hidden
from distkv_dask.client.messages import plain_messages
from distkv_dask.client.text_stream import TextStream
from distkv_dask.client.time_limit import OutOfTime, TimeLimit
from distkv_dask.errors import InvalidRequestError, in_words
from distkv_dask.sampling import Prompt
from distkv_dask.texts import checked_text

TEMPLATE_SECONDS = 10.0
"""Time limit of a chat template, which is a program by the model's author, for a prompt."""


class Tokenizer:
    """A model's tokenizer, or the lack of one: token ids then still work as prompts, and texts are empty.

    All texts of users are encoded here. Text that looks like a control token (``<|im_start|>``) is encoded as text;
    only a chat template's own control tokens are tokens (:mod:`distkv_dask.client.control_tokens`). For others, give
    token ids, which are used unchanged.

    Parameters
    ----------
    loaded
        A transformers tokenizer (:meth:`distkv_dask.models.source.ModelSource.tokenizer`), or None.
    vocab_size
        Token ids that the model knows are below this.
    """

    def __init__(self, loaded: Any | None, vocab_size: int) -> None:
        self._loaded = loaded
        self._vocab_size = vocab_size
        self._control = None if loaded is None else ControlTokens(loaded)
        self._variables: Mapping[str, Any] = {}

    @property
    def has_chat_template(self) -> bool:
        """Whether chat messages can be prompts."""
        return self._loaded is not None and bool(self._loaded.chat_template)

    def encode(self, prompt: Prompt) -> list[int]:
        """Return the token ids of a text, of chat messages (through the model's chat template), or of ids as given.

        Raises
        ------
        InvalidRequestError
            When the prompt is empty, of another type, out of the vocabulary, holds half a surrogate pair, or needs a
            tokenizer or chat template that the model does not have.
        """
        if isinstance(prompt, str):
            ids = self._encode_text(prompt)
        elif isinstance(prompt, (bytes, bytearray, Mapping)) or not isinstance(prompt, Iterable):
            raise InvalidRequestError(
                f"a prompt is a text, a list of token ids or a list of chat messages, not {type(prompt).__name__}"
            )
        else:
            items = list(prompt)
            chat = any(isinstance(item, Mapping) for item in items)
            ids = self._encode_chat(items) if chat else [self._token_id(item, at) for at, item in enumerate(items)]
        if not ids:
            raise InvalidRequestError("the prompt is empty: give at least one token")
        return ids

    @property
    def unknown(self) -> int | None:
        """The token that stands for what the tokenizer does not know, if it has one."""
        return None if self._loaded is None else self._loaded.unk_token_id

    def with_variables(self, variables: Mapping[str, Any]) -> Self:
        """The same tokenizer with variables for its chat template, such as ``{"enable_thinking": False}``.

        Raises
        ------
        InvalidRequestError
            When one is not a template variable: it would change the template, or how it is rendered.
        """
        taken = {"messages"}
        if self._loaded is not None:
            taken |= {*signature(self._loaded.apply_chat_template).parameters, *self._loaded.special_tokens_map}
        for name in variables:
            if not name.isidentifier() or name in taken:
                raise InvalidRequestError(f"{name!r:.100} is not a variable that a chat template may be given")
        other = copy(self)
        other._variables = dict(variables)
        return other

    def encode_more(self, text: str | Sequence[int]) -> list[int]:
        """Return the token ids of a text that follows others, without special tokens; or of ids as given.

        Raises
        ------
        InvalidRequestError
            When it is empty, out of the vocabulary, holds half a surrogate pair, or needs a tokenizer that the model
            does not have.
        """
        if not isinstance(text, str):
            return self.encode(text)
        ids = self._with_tokenizer().encode(checked_text(text, "the question"), add_special_tokens=False)
        if not ids:
            raise InvalidRequestError("the question is empty")
        return ids

    def decode(self, ids: Sequence[int], special: bool = False) -> str:
        """Return the text of token ids, without ``special`` tokens or with; empty when the model has no tokenizer."""
        if self._loaded is None:
            return ""
        text: str = self._loaded.decode(list(ids), skip_special_tokens=not special, clean_up_tokenization_spaces=False)
        return text

    def stream(self, stop: Sequence[str] = ()) -> TextStream:
        """Start the text of one answer, which ends before the first of the strings ``stop``.

        Raises
        ------
        InvalidRequestError
            When there are stop strings but no tokenizer.
        """
        if stop and self._loaded is None:
            raise InvalidRequestError("stop strings need a tokenizer, and the model has none: leave them out")
        return TextStream(self, stop)

    def _with_tokenizer(self) -> ControlTokens:
        if self._control is None:
            raise InvalidRequestError("the model has no tokenizer: give token ids instead of a text")
        return self._control

    def _encode_text(self, text: str) -> list[int]:
        control = self._with_tokenizer()
        if not text:
            raise InvalidRequestError("the prompt is empty: give a text of at least one character")
        return control.encode(checked_text(text, "the prompt"), add_special_tokens=True)

    def _encode_chat(self, messages: Sequence[Any]) -> list[int]:
        if self._control is None or not self.has_chat_template:
            raise InvalidRequestError(
                "the model has no chat template: give a text or token ids instead of chat messages"
            )
        plain = plain_messages(messages)
        for at, message in enumerate(plain):
            for key, value in message.items():
                checked_text(value, f"the {checked_text(key, 'a key')!r:.100} of chat message {at}")
        return self._control.encode_rendered(lambda hidden: self._render_safely(plain, hidden))

    def _render_safely(self, messages: Sequence[Mapping[str, str]], hidden: Hidden) -> str:
        """Render messages whose control tokens are hidden.

        Templates cut off an assistant's reasoning at ``</think>``. So an assistant's control tokens are shown to the
        template, unless some of them remain in its output.
        """
        assert self._control is not None
        shown = {at: dict(one) for at, one in enumerate(messages) if one["role"] == "assistant"}
        others = [
            {key: value if key == "role" else hidden.hide(value) for key, value in one.items()} for one in messages
        ]
        if any(self._control.count(value) for one in shown.values() for value in one.values()):
            bare = {at: {key: self._control.without(value) for key, value in one.items()} for at, one in shown.items()}
            cut, fewest = (self._render([some.get(at, one) for at, one in enumerate(others)]) for some in (shown, bare))
            least = self._control.count(fewest)
            if all(times <= least.get(name, 0) for name, times in self._control.count(cut).items()):
                return cut
        return self._render(others)

    def _render(self, messages: list[dict[str, str]]) -> str:
        from jinja2 import TemplateError

        assert self._loaded is not None
        try:
            with TimeLimit(TEMPLATE_SECONDS):
                text: str = self._loaded.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=True, **self._variables
                )
        except OutOfTime:
            raise InvalidRequestError(
                f"the model's chat template takes more than {TEMPLATE_SECONDS:g} s on these messages and was ended: "
                f"look at its loops, or give token ids instead"
            ) from None
        except TemplateError as error:
            raise InvalidRequestError(f"the model's chat template refuses these messages: {error}") from error
        except Exception as error:  # a template is a program
            raise InvalidRequestError(
                f"the model's chat template fails on these messages: {in_words(error):.200}"
            ) from error
        return text

    def _token_id(self, item: Any, at: int) -> int:
        try:
            token = index(item)
        except TypeError:
            token = None
        if token is None or isinstance(item, bool):
            raise InvalidRequestError(f"prompt item {at} is {item!r:.100}; a token id is an integer")
        if not 0 <= token < self._vocab_size:
            raise InvalidRequestError(
                f"token id {token} at position {at} is out of the model's vocabulary (0 to {self._vocab_size - 1})"
            )
        return token


def is_one_text(given: object) -> bool:
    """Whether this is a single text, given as such or as token ids, and not several texts or chat messages.

    Examples
    --------
    >>> [is_one_text(given) for given in ("a text", [1, 2], ["a text"], [[1, 2]], [])]
    [True, True, False, False, False]
    """
    return isinstance(given, str) or (
        isinstance(given, list | tuple) and bool(given) and all(type(one) is int for one in given)
    )
