"""Sampling that follows a grammar (such as a JSON schema's): before each draw, tokens that would break it get -inf.

A follower is rebuilt from the committed tokens in each window, so a retried window follows in the same way.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from distkv_dask.errors import DistKVError, InvalidRequestError, portable
from distkv_dask.models.grammars import grammar_of, no_panic
from distkv_dask.sampling import Form

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer


class Follower:
    """The position of one answer in its grammar.

    Parameters
    ----------
    form
        The schema, regex or grammar.
    matcher
        At the answer's beginning.
    generated
        The answer's tokens so far.
    """

    def __init__(self, form: Form, matcher: LLMatcher, generated: Iterable[int] = ()) -> None:
        self._form = form
        self._matcher = matcher
        for token in generated:
            self.take_token(token)

    def forbidden(self, vocab: int) -> Tensor:
        """The model's tokens that would break the form, bool [vocab].

        Those that end the answer would until it is complete.

        Raises
        ------
        InvalidRequestError
            The form cannot be followed any further: it takes llguidance too long, or the model has no token for it.
        """
        allowed = np.unpackbits(np.frombuffer(self._ask(self._matcher.compute_bitmask), np.uint8), bitorder="little")
        forbidden = torch.ones(vocab, dtype=torch.bool)
        forbidden[: len(allowed)] = torch.from_numpy(allowed[:vocab] == 0)
        if forbidden.all():
            raise InvalidRequestError(
                f"{self._form.name} cannot be followed any further: no token of the model fits it"
            )
        return forbidden

    def take_token(self, token: int) -> None:
        """Advance by the drawn token."""
        self._ask(partial(self._matcher.consume_token, token))

    def _ask(self, question: Callable[[], Any]) -> Any:
        """Ask the matcher; its own error messages would quote the form and the answer."""
        with no_panic(self._form):
            answer = question()
            if not self._matcher.is_error():
                return answer
            reason = str(self._matcher.stop_reason())
        hint = "make it simpler: fewer properties or alternatives" if "TooComplex" in reason else "simplify it"
        raise InvalidRequestError(f"{self._form.name} cannot be followed any further ({reason}); {hint}")


KEPT = 256
"""Number of compiled grammars that are kept: more than can decode together."""


class Grammars:
    """Followers of grammars for one model; its tokenizer is read on demand.

    A large one takes seconds to compile: threads that must not wait let another one :meth:`prepare` it first.

    Parameters
    ----------
    tokenizer
        Loads the model's transformers tokenizer, or None if it has none.
    eos_token_ids
        Tokens that end an answer.
    vocab_size
        Number of logits.
    """

    def __init__(self, tokenizer: Callable[[], Any | None], eos_token_ids: frozenset[int], vocab_size: int) -> None:
        self._load = tokenizer
        self._eos = sorted(eos_token_ids)
        self._vocab_size = vocab_size
        self._tokenizer: LLTokenizer | None = None
        self._compiling = threading.Lock()
        self._made: dict[Form, LLMatcher | DistKVError] = {}

    def is_prepared(self, form: Form) -> bool:
        """Whether :meth:`follow` does not have to compile a form's grammar."""
        return form in self._made

    def prepare(self, form: Form) -> LLMatcher | DistKVError:
        """Compile a form's grammar, on any thread; returns the result, or the error."""
        if (made := self._made.get(form)) is not None:
            return made
        with self._compiling:
            if form not in self._made:
                try:
                    made = self._compiled(form)
                except Exception as error:
                    made = portable(error, "the compilation of a grammar")
                self._made = dict([*self._made.items(), (form, made)][-KEPT:])  # others may read the old one
            return self._made[form]

    def follow(self, form: Form, generated: Iterable[int] = ()) -> Follower:
        """Follow a form from after the tokens ``generated``, on one thread; :meth:`prepare` it before.

        Raises
        ------
        MissingProgramError
            When llguidance is not installed.
        InvalidRequestError
            When it cannot be followed, or the model has no fast tokenizer or no end-of-sequence token.
        """
        made = self.prepare(form)
        if isinstance(made, DistKVError):
            raise portable(made, "")  # not the exception itself: it would keep the frames of all that raise it
        return Follower(form, made.deep_copy(), generated)

    def _compiled(self, form: Form) -> LLMatcher:
        grammar = grammar_of(form)
        from llguidance import LLMatcher

        if self._tokenizer is None:
            self._tokenizer = self._read_tokenizer(form)
        with no_panic(form):
            matcher = LLMatcher(self._tokenizer, grammar, log_level=0)
            if matcher.is_error():
                reason = matcher.get_error().partition("\n")[0]  # the rest would quote the whole grammar
                raise InvalidRequestError(f"{form.name} cannot be followed: {reason}")
        return matcher

    def _read_tokenizer(self, form: Form) -> LLTokenizer:
        from llguidance.hf import from_tokenizer

        loaded = self._load()
        if loaded is None or not getattr(loaded, "is_fast", False):
            raise InvalidRequestError(f"{form.name} needs a model with a fast Hugging Face tokenizer")
        if not self._eos:
            raise InvalidRequestError(f"{form.name} needs a model with an end-of-sequence token")
        return from_tokenizer(loaded, n_vocab=max(self._vocab_size, len(loaded)), eos_token=self._eos)
