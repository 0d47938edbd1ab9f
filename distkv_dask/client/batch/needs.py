"""What a batch needs, known before anything is answered: the tokens of every row, and which rows will be refused.

The plans that answer rows are run with made-up answers, so a dry run refuses what a run refuses, with the same errors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from distkv_dask.client.batch.answer_plan import Plan, plan_answer
from distkv_dask.client.batch.row_documents import shared_prefix
from distkv_dask.client.batch.rows import Content
from distkv_dask.client.batch.spec import BatchSpec
from distkv_dask.client.session.request import checked
from distkv_dask.client.tokenizer import Tokenizer
from distkv_dask.completion import Completion
from distkv_dask.errors import in_words
from distkv_dask.models.source import resolve_model
from distkv_dask.sampling import SamplingParams


@dataclass(frozen=True, slots=True)
class Need:
    """One question about one row.

    Parameters
    ----------
    label, question
        The row's label, and the question.
    prompts
        Tokens of each of its prompts.
    shared
        Tokens of each prompt whose KV comes from the row's document.
    document
        Tokens of the document, if this question is the one that computes it.
    new
        Most tokens of each answer.
    answers
        Number of answers to each prompt.
    error
        Why it will be refused.
    """

    label: int | str
    question: str | None
    prompts: tuple[int, ...] = ()
    shared: int = 0
    document: int = 0
    new: int = 0
    answers: int = 1
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Counting:
    """How rows are counted: the model's name and RoPE scaling, its vocabulary and window, and tokens of a block."""

    model: str
    rope: tuple[tuple[str, object], ...] | None
    vocab_size: int
    window: float
    block_tokens: int


_NO_NUMBERS = np.empty(0, np.float32)

Lot = Sequence[tuple[int | str, Content | str]]
"""Rows by their labels, each with its content or its error."""


def count_lot(lot: Lot, spec: BatchSpec, how: Counting) -> list[Need]:
    """Count rows, with a tokenizer of this process; also as a task."""
    tokenizer = _tokenizer(how.model, how.rope, how.vocab_size)
    return [need for label, content in lot for need in count_row(label, content, spec, tokenizer, how)]


def count_row(
    label: int | str, content: Content | str, spec: BatchSpec, tokenizer: Tokenizer, how: Counting
) -> list[Need]:
    """What each question about a row needs."""
    if isinstance(content, str):
        return [Need(label, question, error=content) for question in spec.questions]
    several = len(spec.questions) > 1 and content.prompt is None
    prefix = len(shared_prefix(content, spec, tokenizer, how.window)) if several else 0
    shared = prefix // how.block_tokens * how.block_tokens
    found: list[Need] = []
    for question in spec.questions:
        try:
            sampling = spec.sampling_for(content)
            text = None if content.prompt is not None else str(content.values[spec.text_column])
            plan = plan_answer(content, question, spec, tokenizer, how.window)
            prompts = _prompts(plan, sampling, text, tokenizer, how.window)
            document = 0 if any(one.error is None for one in found) else shared
            new, drawn = _longest(sampling, tokenizer), sampling.best_of or sampling.n
            found.append(Need(label, question, prompts, shared, document, new, drawn))
        except Exception as error:  # as the row's own in a run
            found.append(Need(label, question, error=in_words(error)))
    return found


def _prompts(
    plan: Plan, sampling: SamplingParams, text: str | None, tokenizer: Tokenizer, window: float
) -> tuple[int, ...]:
    """Lengths of all prompts of a plan, if all answers have their maximum length."""
    lengths: list[int] = []
    done: list[Completion] | None = None
    while True:
        try:
            asked = next(plan) if done is None else plan.send(done)
        except StopIteration:
            return tuple(lengths)
        done = []
        for ids in asked.prompts:
            drawn = checked(sampling if asked.last else sampling.without_form(), len(ids), window, text)
            tokens = tuple(ids[: drawn.new_tokens])
            said = "" if asked.last else tokenizer.decode(tokens)
            done.append(Completion(said, tokens, len(ids), "length", embedding=_NO_NUMBERS))
            lengths.append(len(ids))


def _longest(sampling: SamplingParams, tokenizer: Tokenizer) -> int:
    """Maximum tokens of an answer; with choices, those of the longest one."""
    if sampling.choices is None:
        return sampling.new_tokens
    return max(len(tokenizer.encode_more(choice)) for choice in sampling.choices)


@lru_cache(maxsize=1)
def _tokenizer(model: str, rope: tuple[tuple[str, object], ...] | None, vocab_size: int) -> Tokenizer:
    source = resolve_model(model, None if rope is None else dict(rope))
    return Tokenizer(source.tokenizer(), vocab_size)
