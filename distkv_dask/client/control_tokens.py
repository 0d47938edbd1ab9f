"""Control tokens: texts of users and documents never become tokens such as ``<|im_start|>``.

Transformers encodes ``<|im_start|>`` in any text as the token, so a document could begin a system message. Here a copy
of the tokenizer is used in which every control token has a secret name. A user's text cannot contain the secret, so it
is encoded as plain characters. Control tokens of a chat template are translated to the secrets first. Nothing else
differs in the copy, so all other texts have the same ids.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Iterable
from functools import cached_property
from typing import Any

from distkv_dask.errors import InvalidRequestError

_SHAPE = re.compile(r"\W.*\w.*\W", re.DOTALL)
"""How a control token is spelled: a word in brackets of some kind."""

_MARKUP = re.compile(
    r"</?(?:a|b|blockquote|br|caption|code|div|em|h[1-6]|hr|i|img|li|ol|p|pre|span|strong|su[bp]|table|tbody|td|tfoot|"
    r"th|thead|tr|u|ul)\s*/?>"
)
"""Tags of web pages, which some vocabularies hold as tokens of ordinary text."""

_SIGNS = range(0x12000, 0x1236F)
"""Cuneiform letters: no normalizer, splitter or template treats them in any way, and texts rarely hold them."""


def secret() -> str:
    """Return a word that cannot be guessed (one of 2 ** 117)."""
    return "".join(chr(secrets.choice(_SIGNS)) for _ in range(12))


class ControlTokens:
    """Encodes texts with a tokenizer's control tokens under other names.

    Control tokens are the added tokens that are marked special, and those in brackets of some kind that are not; runs
    of spaces, words and tags of web pages that were added to a vocabulary are ordinary text.

    Parameters
    ----------
    loaded
        A transformers tokenizer.
    """

    def __init__(self, loaded: Any) -> None:
        self._loaded = loaded
        added = {str(token.content): token for token in loaded.added_tokens_decoder.values()}
        self._names = {name: secret() for name, token in added.items() if _is_control(name, token.special)}
        longest_first = sorted(self._names, key=len, reverse=True)
        self._anywhere = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        words = (
            rf"(?<!\w){re.escape(name)}(?!\w)" if added[name].single_word else re.escape(name) for name in longest_first
        )
        self._matched = re.compile("|".join(words) or "(?!)")
        self._beginnings = {name[:length] for name in self._names for length in range(1, len(name))}
        self._ends = {name[length:] for name in self._names for length in range(1, len(name))}
        self._longest = max(map(len, self._names), default=0)

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """Return the ids of a user's text; control tokens in it are encoded as plain characters.

        Raises
        ------
        InvalidRequestError
            When the tokenizer cannot encode it.
        """
        if not self._can_rename:
            if found := self._anywhere.search(text):
                raise InvalidRequestError(
                    f"the text holds the control token {found.group()!r} at character {found.start()}, which this "
                    "model's tokenizer cannot encode as text: take it out, or give token ids"
                )
            return list(self._loaded(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"])
        return self._ids(text, add_special_tokens)

    def encode_rendered(self, render: Callable[[Hidden], str]) -> list[int]:
        """Return the ids of a template's output, with control tokens only from the template.

        Parameters
        ----------
        render
            Renders users' texts as the :class:`Hidden` that it is called with hides them.

        Raises
        ------
        InvalidRequestError
            When the tokenizer cannot encode it, or the template cuts or changes control tokens in users' texts.
        """
        hidden = Hidden(self)
        text = render(hidden)
        if not self._can_rename:
            if hidden.found:
                raise InvalidRequestError(
                    "a chat message holds control tokens, which this model's tokenizer cannot encode as text: take "
                    "them out, or give token ids"
                )
            return list(self._loaded(hidden.show(text), add_special_tokens=False, verbose=False)["input_ids"])
        named = self._matched.sub(lambda found: self._names[found.group()], text)
        return self._ids(hidden.show(named), add_special_tokens=False)

    def is_whole(self, text: str) -> bool:
        """Whether a text is a control token, and nothing else."""
        return text in self._names

    def count(self, text: str) -> dict[str, int]:
        """How often each control token occurs in a text."""
        counts: dict[str, int] = {}
        for name in self._anywhere.findall(text):
            counts[name] = counts.get(name, 0) + 1
        return counts

    def without(self, text: str) -> str:
        """A text without its control tokens, and without those that their removal leaves behind."""
        while (bare := self._anywhere.sub("", text)) != text:
            text = bare
        return text

    def hide(self, text: str, keep: Callable[[str], str]) -> str:
        """Replace control tokens in a text, and parts of one at either end, by what ``keep`` returns for them."""
        parts = range(min(self._longest - 1, len(text)), 0, -1)
        end = next((length for length in parts if text[-length:] in self._beginnings), 0)
        body, tail = (text[:-end], keep(text[-end:])) if end else (text, "")
        begin = next((length for length in parts if length <= len(body) and body[:length] in self._ends), 0)
        head, body = (keep(body[:begin]), body[begin:]) if begin else ("", body)
        return head + self._anywhere.sub(lambda found: keep(found.group()), body) + tail

    def _ids(self, text: str, add_special_tokens: bool) -> list[int]:
        try:
            (encoding,) = self._renamed.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        except Exception as error:  # tokenizers raises plain Exception, for a character without any token for instance
            raise InvalidRequestError(f"the model's tokenizer cannot encode the text: {error}") from error
        return list(encoding.ids)

    @property
    def _can_rename(self) -> bool:
        """Whether it is a tokenizer of the tokenizers library."""
        return hasattr(getattr(self._loaded, "backend_tokenizer", None), "to_str")

    @cached_property
    def _renamed(self) -> Any:
        """The copy with secret names."""
        backend = self._loaded.backend_tokenizer
        renamed = type(backend).from_str(json.dumps(_renamed(json.loads(backend.to_str()), self._names)))
        renamed.no_truncation()
        renamed.no_padding()
        return renamed


class Hidden:
    """Control tokens in users' texts, hidden while a chat template runs."""

    def __init__(self, control: ControlTokens) -> None:
        self.found = False
        """Whether a whole control token was hidden."""
        self._control = control
        self._secret = secret()
        self._pieces: list[str] = []

    def hide(self, text: str) -> str:
        """Return the text with secrets in place of control tokens, and of parts of them at either end."""
        return self._control.hide(text, self._keep)

    def show(self, text: str) -> str:
        """Return a template's output with the users' texts as they were.

        Raises
        ------
        InvalidRequestError
            When the template has cut or changed a secret.
        """
        pieces = iter(re.split(f"{self._secret}([0-9]+){self._secret}", text))
        shown = [next(pieces)]
        for number, between in zip(pieces, pieces, strict=True):
            shown += [self._pieces[int(number)], between]
        if any(self._secret in piece for piece in shown):
            raise InvalidRequestError(
                "the model's chat template cuts or changes a control token within a message: take it out"
            )
        return "".join(shown)

    def _keep(self, piece: str) -> str:
        self.found |= self._control.is_whole(piece)
        self._pieces.append(piece)
        return f"{self._secret}{len(self._pieces) - 1}{self._secret}"


def _is_control(name: str, special: bool) -> bool:
    if len(name) < 2 or name.isspace():  # a letter of the alphabet, whatever else it may mean
        return False
    return special or (_SHAPE.fullmatch(name) is not None and _MARKUP.fullmatch(name) is None)


def _renamed(description: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    """Rename tokens in a ``tokenizer.json``; ids stay, and no merge leads to one that was renamed."""
    model = description["model"]
    for token in description["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(name, name): number for name, number in model["vocab"].items()}
    else:
        model["vocab"] = [[names.get(name, name), score] for name, score in model["vocab"]]
    if "merges" in model:
        model["merges"] = list(_other_merges(model, names))
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    return description


def _other_merges(model: dict[str, Any], names: dict[str, str]) -> Iterable[Any]:
    prefix = model.get("continuing_subword_prefix") or ""
    for merge in model["merges"]:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        if names.keys().isdisjoint((left, right, left + right.removeprefix(prefix))):
            yield merge
