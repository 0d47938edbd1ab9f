"""How one row is answered: with one request, or several if the document is longer than the model's window.

A plan is a generator: it yields rounds of prompts to be answered together, is sent their completions, and returns the
row's answer.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from distkv_dask.client.batch.details import details_of, embedded_response, response_of
from distkv_dask.client.batch.rows import Content, Texts
from distkv_dask.client.batch.spec import BatchSpec, TooLong
from distkv_dask.client.documents.prompts import prompt_ids
from distkv_dask.client.tokenizer import Tokenizer
from distkv_dask.completion import Completion
from distkv_dask.errors import InvalidRequestError
from distkv_dask.quotes import Quote


@dataclass(frozen=True, slots=True)
class Answer:
    """The result of a row: its document was split into ``parts``, and ``dropped_tokens`` of it were left out.

    ``reused_tokens`` of its prompts were not computed.
    """

    text: str
    finish_reason: str
    prompt_tokens: int
    new_tokens: int
    parts: int = 1
    dropped_tokens: int = 0
    reused_tokens: int = 0
    quote: Quote | None = None
    details: Mapping[str, Any] = field(default_factory=dict)
    """Values of further columns."""


@dataclass(frozen=True, slots=True)
class Round:
    """Prompts (token ids) to be answered together; ``last`` marks the one with the row's answer."""

    prompts: list[list[int]]
    last: bool = True


Plan = Generator[Round, list[Completion], Answer]


def check_servable(spec: BatchSpec, tokenizer: Tokenizer, window: float) -> None:
    """Raise :class:`InvalidRequestError` if an engine cannot answer any row of a batch, whatever its text."""
    if len(prompt_ids("x", tokenizer)) + spec.sampling.new_tokens > window:
        raise InvalidRequestError(
            f"max_new_tokens={spec.sampling.max_new_tokens} leaves no room for a prompt in the model's window of "
            f"{window} tokens: lower it"
        )


def plan_answer(content: Content, question: str | None, spec: BatchSpec, tokenizer: Tokenizer, window: float) -> Plan:
    """Plan the answer to one question about one row.

    Parameters
    ----------
    content, question, spec
        The row's content, the question, and the batch's settings.
    tokenizer
        The model's.
    window
        The model's window in tokens, prompt and answer together.

    Raises
    ------
    InvalidRequestError
        While it runs, when the row cannot be answered.
    """
    if isinstance(content.prompt, Texts):
        return (yield from _embedded(content.prompt, tokenizer))
    if content.prompt is not None:
        asked = tokenizer.with_variables(content.template) if content.template else tokenizer
        chat = not isinstance(content.prompt, str) and isinstance(next(iter(content.prompt), None), Mapping)
        return (yield from _plain(asked.encode(content.prompt), tokenizer, chat=chat))
    text = str(content.values[spec.text_column])
    if not text.strip():
        raise InvalidRequestError("the text is empty")

    def prompt(document: str) -> list[int]:
        rendered = spec.render({**content.values, spec.text_column: document}, question)
        return tokenizer.encode(rendered) if spec.sampling.embed is not None else prompt_ids(rendered, tokenizer)

    whole, room = prompt(text), window - spec.sampling.new_tokens
    if len(whole) <= room or spec.too_long == "refuse":  # a prompt that is too long is refused when it is submitted
        return (yield from _plain(whole, tokenizer))
    document = tokenizer.encode(text)
    share = int(room) - (len(whole) - len(document))
    if spec.too_long == "map-reduce":
        parts, _ = _fitting(lambda size: _parts(document, size, spec.overlap), share, prompt, tokenizer, room)
        return (yield from _map_reduce(parts, question, spec, tokenizer, room))
    cut, size = _fitting(lambda size: [_cut(document, size, spec.too_long)], share, prompt, tokenizer, room)
    return (yield from _plain(cut[0], tokenizer, len(document) - size))


def _plain(prompt: list[int], tokenizer: Tokenizer, dropped: int = 0, chat: bool | None = None) -> Plan:
    """Ask one prompt, which is an OpenAI request's if it is known whether that is a ``chat``."""
    (done,) = yield Round([prompt])
    new, reused = sum(len(one.token_ids) for one in done.answers), done.reused_tokens
    details = details_of(done, tokenizer) | ({} if chat is None else response_of(done, chat, tokenizer))
    return Answer(done.text, done.finish_reason, done.prompt_tokens, new, 1, dropped, reused, done.quote, details)


def _embedded(texts: Texts, tokenizer: Tokenizer) -> Plan:
    """Embed the texts of one request, together."""
    done = yield Round([tokenizer.encode(one) for one in texts.prompts])
    tokens, reused = (sum(one.prompt_tokens for one in done), sum(one.reused_tokens for one in done))
    return Answer("", "stop", tokens, 0, reused_tokens=reused, details=embedded_response(done, texts.base64))


def _map_reduce(
    parts: list[list[int]], question: str | None, spec: BatchSpec, tokenizer: Tokenizer, room: float
) -> Plan:
    """Ask about every part, then combine as many answers at a time as fit, until one is left."""
    done = yield Round(parts, last=len(parts) == 1)
    asked, answers = list(done), [one.text.strip() for one in done]
    while len(answers) > 1:
        groups = _groups(answers, question, spec, tokenizer, room)
        done = yield Round([prompt for size, prompt in groups if size > 1], last=len(groups) == 1)
        asked += done
        combined = iter(done)
        # Only the last group can have one answer: it waits for the next round.
        answers = [next(combined).text.strip() if size > 1 else answers[-1] for size, _ in groups]
    last = asked[-1]
    prompt_tokens, new_tokens = (sum(one.prompt_tokens for one in asked), sum(len(one.token_ids) for one in asked))
    reused = sum(one.reused_tokens for one in asked)
    reason, quote = last.finish_reason, last.quote
    details = details_of(last, tokenizer)
    return Answer(answers[0], reason, prompt_tokens, new_tokens, len(parts), 0, reused, quote, details)


def _groups(
    answers: Sequence[str], question: str | None, spec: BatchSpec, tokenizer: Tokenizer, room: float
) -> list[tuple[int, list[int]]]:
    """Cut answers into groups whose combining prompts fit; returns size and prompt of each."""

    def prompt(start: int, size: int) -> list[int]:
        joined = "\n\n".join(answers[start : start + size])
        return prompt_ids(spec.combined(joined, question), tokenizer)

    groups: list[tuple[int, list[int]]] = []
    start = 0
    while start < len(answers):
        size, ids = 1, prompt(start, 1)
        while start + size < len(answers) and len(longer := prompt(start, size + 1)) <= room:
            size, ids = size + 1, longer
        if size == 1 and start + 1 < len(answers):
            raise InvalidRequestError(
                "the answers about two parts do not fit the window together: lower max_new_tokens"
            )
        groups.append((size, ids))
        start += size
    return groups


def _fitting(
    cuts: Callable[[int], list[list[int]]],
    size: int,
    prompt: Callable[[str], list[int]],
    tokenizer: Tokenizer,
    room: float,
) -> tuple[list[list[int]], int]:
    """Return prompts about pieces of at most ``size`` tokens, or fewer if cutting the text changes its tokens."""
    while size > 0:
        prompts = [prompt(tokenizer.decode(piece).strip("\N{REPLACEMENT CHARACTER}")) for piece in cuts(size)]
        excess = max(map(len, prompts)) - room
        if excess <= 0:
            return prompts, size
        size -= int(excess)
    raise InvalidRequestError("the question alone is longer than the model's window: shorten it, or max_new_tokens")


def _cut(document: list[int], size: int, how: TooLong) -> list[int]:
    if how == "truncate-head":
        return document[len(document) - size :]
    if how == "truncate-tail":
        return document[:size]
    head = (size + 1) // 2
    return document[:head] + document[len(document) - (size - head) :]


def _parts(document: list[int], size: int, overlap: int) -> list[list[int]]:
    if size <= overlap:
        raise InvalidRequestError(
            f"parts of {size} tokens cannot overlap by {overlap}: lower the overlap or max_new_tokens"
        )
    return [document[start : start + size] for start in range(0, len(document) - overlap, size - overlap)]
