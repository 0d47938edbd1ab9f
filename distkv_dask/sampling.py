"""Prompts and sampling parameters, checked on construction."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

from distkv_dask.errors import InvalidRequestError
from distkv_dask.logprobs import MOST_LOGPROBS
from distkv_dask.quotes import QuoteForm, quote_grammar
from distkv_dask.sampling_values import choice_values, place, real, refusal, schema_text, strings, text_value, whole

FinishReason = Literal["stop", "length", "error", "cancelled"]
Message = dict[str, Any]
MOST_ANSWERS = 128
"""Maximum answers to one prompt."""
Embed = Literal["mean", "last"]
"""Which of a text's hidden states are its embedding: their mean, or the last token's."""
YES_NO = ("Yes", "No")
"""Choices of a yes/no question whose score is one number, the probability of the first."""
Prompt = str | Sequence[int] | Sequence[Message]


class Form(NamedTuple):
    """What constrains the text of an answer."""

    kind: Literal["schema", "regex", "grammar"]
    text: str

    @property
    def name(self) -> str:
        """For people."""
        return _FORMS[self.kind]


_FORMS = {"schema": "the JSON schema", "regex": "the regular expression", "grammar": "the grammar"}


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are drawn, and the request's priority.

    Parameters
    ----------
    max_new_tokens
        Upper bound on generated tokens, at least 1.
    temperature
        0 is greedy. Otherwise logits are divided by the temperature before sampling.
    top_p, top_k, min_p
        Nucleus, top-k and min-p filters, applied in the order of Hugging Face's logits warpers
        (temperature, top-k, top-p, min-p). ``top_p=1``, ``top_k=0`` and ``min_p=0`` switch a filter off.
    repetition_penalty
        As in CTRL (arXiv 1909.05858): over prompt and generated tokens; 1 means no penalty.
    seed
        Draws depend only on (seed, position), so a retried window draws the same tokens. None picks a random seed.
    stop
        Strings at which generation ends; the text ends before the first of them.
    ignore_eos
        Continue after the model's end-of-sequence token.
    schema
        A JSON schema (a dict, or its JSON). The answer is always JSON that follows it, unless ``max_new_tokens`` cuts
        the answer short. Needs the extra ``schema``. The schema is kept as JSON.
    regex
        A regular expression, in the syntax of Rust's ``regex`` (without look-around), that the whole answer always
        matches, unless ``max_new_tokens`` cuts it short. Needs the extra ``schema``.
    grammar
        As ``regex``, but a context-free grammar in llguidance's variant of Lark
        (https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md).
    quotes
        For questions on a document (``document.ask``, ``engine.process``): True makes every answer a span of the
        document, word for word; ``"evidence"`` lets such a quote follow a free answer of one line.
        :attr:`Completion.quote` says where it is. Needs the extra ``schema``.
    priority
        From -100 to 100. While requests wait for room, each step of priority lets a request overtake those that arrived
        up to a minute earlier. Running requests are preempted in the same order, and continue later. So no request
        waits forever.
    logprobs
        Return the log probability of every generated token, and of this many (0 to 20) of the most likely ones in its
        place: :attr:`Completion.logprobs`. None returns none.
    prompt_logprobs
        The same for the tokens of the prompt: :attr:`Completion.prompt_logprobs`. The whole prompt is computed then; no
        KV is reused.
    choices
        Texts, or lists of token ids: the answer is exactly one of them, the most likely, or one drawn by their
        probabilities at a temperature above 0. :attr:`Completion.scores` has the probability of each. They are scored
        in short forwards after the prompt and need no decode steps; ``max_new_tokens`` does not matter. Where one
        choice is the beginning of another in tokens, the end-of-sequence token counts as part of the shorter one.
    n
        How many answers to draw for the prompt (1 to 128), each with its own seed, which depends only on ``seed``. The
        prompt is computed once, and its KV is shared. :attr:`Completion.answers` has them. Needs a temperature above 0.
    best_of
        How many answers are drawn; the ``n`` best of them, by log probability per token, are returned.
    adapter
        Path of a LoRA adapter as peft saves it, with which prompt and answer are computed; the client and every worker
        must be able to read it. It is computed separately from the model's weights, not merged into them. A question on
        a document has the document's adapter (``engine.ingest(..., adapter=...)``). Needs the extra ``lora``.
    embed
        Instead of an answer, the prompt's embedding: the ``"mean"`` of all tokens' hidden states after the model's last
        norm, or that of the ``"last"`` token (:attr:`Completion.embedding`). Only ``priority``, ``adapter`` and
        ``normalize`` can be set with it. For the mean, no KV is reused.
    normalize
        Whether embeddings have length 1; None means no.

    Raises
    ------
    InvalidRequestError
        On a value outside its range; the message names the parameter.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    schema: str | Mapping[str, Any] | None = None
    priority: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    regex: str | None = None
    grammar: str | None = None
    choices: tuple[str | tuple[int, ...], ...] | None = None
    quotes: QuoteForm | bool | None = None
    n: int = 1
    best_of: int | None = None
    adapter: str | os.PathLike[str] | None = None
    embed: Embed | None = None
    normalize: bool | None = None

    def __post_init__(self) -> None:
        """Check every value, and bring numbers and ``stop`` to the declared types."""
        put = partial(object.__setattr__, self)  # the only way to set a field of a frozen dataclass
        put("max_new_tokens", whole("max_new_tokens", self.max_new_tokens, low=1))
        put("temperature", real("temperature", self.temperature, "at least 0", lambda x: x >= 0))
        put("top_p", real("top_p", self.top_p, "above 0 and at most 1", lambda x: 0 < x <= 1))
        put("top_k", whole("top_k", self.top_k, low=0))
        put("min_p", real("min_p", self.min_p, "from 0 to 1", lambda x: 0 <= x <= 1))
        put("repetition_penalty", real("repetition_penalty", self.repetition_penalty, "above 0", lambda x: x > 0))
        if self.seed is not None:
            put("seed", whole("seed", self.seed, low=0, high=2**63 - 1))
        put("stop", strings("stop", self.stop))
        put("priority", whole("priority", self.priority, low=-100, high=100))
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                put(name, whole(name, getattr(self, name), low=0, high=MOST_LOGPROBS))
        if not isinstance(self.ignore_eos, bool):
            raise refusal("ignore_eos", self.ignore_eos, "True or False")
        put("n", whole("n", self.n, low=1, high=MOST_ANSWERS))
        if self.best_of is not None:
            put("best_of", whole("best_of", self.best_of, low=self.n, high=MOST_ANSWERS))
        if self.adapter is not None:
            put("adapter", place("adapter", self.adapter))
        self._check_answers()
        if self.schema is not None:
            put("schema", schema_text(self.schema))
        for name in ("regex", "grammar"):
            if getattr(self, name) is not None:
                put(name, text_value(name, getattr(self, name)))
        if not (self.quotes is None or isinstance(self.quotes, bool) or self.quotes in get_args(QuoteForm)):
            raise refusal("quotes", self.quotes, 'True, False or "evidence"')
        put("quotes", "answer" if self.quotes is True else self.quotes or None)
        if self.choices is not None:
            put("choices", choice_values(self.choices))
            self._check_choices()
        if self.embed is not None or self.normalize is not None:
            self._check_embed()
            put("max_new_tokens", 1)
        self._check_forms()

    def quoting(self, document: str | None) -> SamplingParams:
        """The same for a question on a document with this text: quotes become a grammar.

        Raises
        ------
        InvalidRequestError
            When quotes are requested, but there is no text to quote.
        """
        if (form := self.quotes) is None or isinstance(form, bool):
            return self
        if document is None:
            raise InvalidRequestError(
                "quotes are of a document that is a text: ask with document.ask, engine.process, distkv ask or run"
            )
        return replace(self, quotes=None, grammar=quote_grammar(document, form))

    def without_form(self) -> SamplingParams:
        """The same without constraints on the answer's text."""
        return replace(self, schema=None, regex=None, grammar=None, quotes=None, choices=None, n=1, best_of=None)

    @property
    def form(self) -> Form | None:
        """The constraint on the answer's text, if there is one."""
        kinds: tuple[Literal["schema", "regex", "grammar"], ...] = ("schema", "regex", "grammar")
        return next((Form(kind, str(text)) for kind in kinds if (text := getattr(self, kind)) is not None), None)

    def updated(self, said: Mapping[str, Any]) -> SamplingParams:
        """The same with a request's own values; for an embedding, only priority and adapter are kept."""
        return replace(
            self if said.get("embed") is None else SamplingParams(priority=self.priority, adapter=self.adapter), **said
        )

    @property
    def new_tokens(self) -> int:
        """Maximum tokens of an answer; 0 for an embedding."""
        return 0 if self.embed is not None else self.max_new_tokens

    def _check_forms(self) -> None:
        """Refuse an answer with two constraints, or with an end other than its constraint's."""
        given = [kind for kind in (*_FORMS, "quotes") if getattr(self, kind) is not None]
        if len(given) > 1:
            raise InvalidRequestError(f"an answer follows one of {' and '.join(given)}: leave out the others")
        if given and (self.ignore_eos or self.stop):
            raise InvalidRequestError(
                f"an answer with a {given[0]} ends where that ends: leave out ignore_eos and stop"
            )

    def _check_answers(self) -> None:
        """Refuse several answers that would all be the same."""
        if self.temperature == 0 and max(self.n, self.best_of or 1) > 1:
            raise InvalidRequestError(
                "at temperature 0 all answers are the same: set a temperature, or leave out n and best_of"
            )

    def _check_choices(self) -> None:
        """Refuse parameters that make no sense with choices."""
        usual = {"stop": (), "ignore_eos": False, "repetition_penalty": 1.0, "n": 1}
        usual |= dict.fromkeys(("best_of", "quotes", *_FORMS))
        for name, value in usual.items():
            if getattr(self, name) != value:
                raise InvalidRequestError(f"an answer that is one of some choices has no {name}: leave out one of them")

    def _check_embed(self) -> None:
        """Refuse parameters that make no sense for an embedding."""
        if self.embed not in get_args(Embed):
            if self.embed is None:
                raise InvalidRequestError('normalize is for embeddings: add embed="mean" or leave out normalize')
            raise refusal("embed", self.embed, '"mean" or "last"')
        if not (self.normalize is None or isinstance(self.normalize, bool)):
            raise refusal("normalize", self.normalize, "True or False")
        for one in fields(self):
            said = getattr(self, one.name)
            if one.name in ("embed", "normalize", "priority", "adapter") or said == one.default:
                continue
            if one.name != "max_new_tokens" or said != 1:
                raise InvalidRequestError(f"an embedding has no answer, and so no {one.name}: leave out one of them")
