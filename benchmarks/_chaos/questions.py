"""Prompts of all kinds, with the tokens that transformers generates in one process, in float32."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from random import Random
from typing import Any

import torch
import transformers
from torch import Tensor

from distkv_dask import SamplingParams
from distkv_dask.client.documents.prompts import DocumentPrompts, Turn, prompts_of
from distkv_dask.client.tokenizer import Tokenizer
from distkv_dask.worker.model.sampling import Draw, sample_batch
from distkv_dask.worker.model.structured import Follower, Grammars

SHAKE = 3e-4
"""Two ways to compute logits in float32 differ by less (1e-5); answers that such a difference changes are left out."""

SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["one", "two", "many"]}, "number": {"type": "integer", "maximum": 9, "minimum": 0}},
    "required": ["kind", "number"],
    "additionalProperties": False,
}
TALK = "What is it about?", "Why?", "Is there more to say?"


@dataclass(frozen=True)
class Question:
    """One prompt, its sampling parameters, and the right tokens."""

    name: str
    prompt: tuple[int, ...]
    sampling: SamplingParams
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Text:
    """A document and questions about it; in a chat each question follows the one before and its answer."""

    name: str
    text: str
    asked: tuple[str, ...]
    questions: tuple[Question, ...]


class _Draw(transformers.LogitsProcessor):
    """Keep only the drawn token, and note whether rounding could change it."""

    def __init__(self, sampling: SamplingParams, follower: Follower | None) -> None:
        self._sampling = sampling
        self._follower = follower
        self._noise = torch.Generator().manual_seed(1)
        self.steady = True

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        draw = Draw(self._sampling, input_ids.shape[1], input_ids[0].tolist(), self._follower)
        (token,) = sample_batch(scores.float(), [draw])
        assert isinstance(token, int), token
        shaken = scores + SHAKE * torch.randn((2, scores.shape[1]), generator=self._noise)
        self.steady &= sample_batch(shaken, [draw, draw]) == [token, token]
        if self._follower is not None and token != scores.shape[1] - 1:  # the last token ends answers
            self._follower.take_token(token)
        return torch.full_like(scores, -torch.inf).index_fill_(1, torch.tensor([token]), 0.0)


class Questions:
    """All questions of a run.

    Parameters
    ----------
    model
        Folder of a model whose last token ends sequences.
    seed
        Decides the prompts.
    room
        Tokens that one worker has memory for.
    few
        Make only as many of each kind as a short run needs.
    """

    def __init__(self, model: Path, seed: int, room: int, few: bool = False) -> None:
        self._draw = Random(f"questions {seed}")
        self._room = room
        self._plain: Any = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        self._vocab = self._plain.config.vocab_size
        loaded = transformers.AutoTokenizer.from_pretrained(model)
        self._tokenizer = Tokenizer(loaded, self._vocab)
        self._grammars = Grammars(lambda: loaded, frozenset({self._vocab - 1}), self._vocab)
        many = 3 if few else 8
        self.plain = self._several("plain", many, lambda: (self._ids(10, room // 2), self._greedy(20, 160)))
        self.wide = self._several("wide", many // 2, lambda: (self._ids(room, room * 3), self._greedy(30, 120)))
        self.sampled = self._several("sampled", many, lambda: (self._ids(10, room // 2), self._drawn()))
        self.schema = self._several("schema", many // 2, lambda: (self._ids(10, 60), self._structured()))
        self.too_large = [
            Question(f"too-large-{n}", tuple(self._ids(3950, 3980)), SamplingParams(max_new_tokens=new), ())
            for n, new in enumerate((100, 4000))  # larger than nine workers' memory, and than the model's window
        ]
        self.shared = [self._text(f"shared-{n}", room * 3 // 5) for n in range(2 if few else 3)]
        self.documents = [self._text(f"document-{n}", room // 2) for n in range(2 if few else 4)]
        self.chats = [self._chat(f"chat-{n}", room // 3) for n in range(1 if few else 3)]
        del self._plain

    # Prompts

    def _ids(self, low: int, high: int) -> list[int]:
        return [self._draw.randrange(self._vocab - 1) for _ in range(self._draw.randint(low, high))]

    def _greedy(self, low: int, high: int) -> SamplingParams:
        return SamplingParams(max_new_tokens=self._draw.randint(low, high), ignore_eos=True)

    def _drawn(self) -> SamplingParams:
        return SamplingParams(
            max_new_tokens=self._draw.randint(20, 160),
            temperature=self._draw.choice([0.7, 1.0]),
            top_p=self._draw.choice([0.9, 1.0]),
            repetition_penalty=self._draw.choice([1.0, 1.2]),
            seed=self._draw.getrandbits(40),
            ignore_eos=True,
        )

    def _structured(self) -> SamplingParams:
        seed = self._draw.getrandbits(40)
        return SamplingParams(max_new_tokens=200, temperature=1.0, seed=seed, schema=SCHEMA)

    def _source(self, tokens: int) -> str:
        text = topics[self._draw.choice(sorted(name for name in topics if len(topics[name]) > 3000))]
        begin = self._draw.randrange(1000)
        return "".join(letter for letter in text[begin : begin + tokens] if letter.isascii())

    def _text(self, name: str, tokens: int) -> Text:
        while True:
            text = self._source(tokens)
            prompts: DocumentPrompts = prompts_of(text, self._tokenizer)
            asked = tuple(f"{word} {self._draw.randrange(1000)}?" for word in ("Who", "What", "Where"))
            several = ((prompts.prompt(one), self._greedy(10, 60)) for one in asked)
            questions = [self._answered(f"{name}: {one}", *it) for one, it in zip(asked, several, strict=True)]
            if all(one is not None for one in questions):
                return Text(name, text, asked, tuple(one for one in questions if one is not None))

    def _chat(self, name: str, tokens: int) -> Text:
        while True:
            text = self._source(tokens)
            prompts, questions, turns = prompts_of(text, self._tokenizer), list[Question](), list[Turn]()
            for asked in TALK:
                question = self._answered(f"{name}: {asked}", prompts.prompt(asked, turns), self._greedy(10, 40))
                if question is None:
                    break
                stream = self._tokenizer.stream(())
                stream.add(question.tokens)
                stream.finish()
                turns.append((asked, stream.text, question.tokens))
                questions.append(question)
            else:
                return Text(name, text, TALK, tuple(questions))

    def _several(self, name: str, many: int, make: Callable[[], tuple[list[int], SamplingParams]]) -> list[Question]:
        found: list[Question] = []
        while len(found) < many:
            if (question := self._answered(f"{name}-{len(found)}", *make())) is not None:
                found.append(question)
        return found

    # Answers

    def _answered(self, name: str, prompt: Sequence[int], sampling: SamplingParams) -> Question | None:
        """The question with the tokens that transformers generates; None if rounding decides one of them."""
        follower = None if (form := sampling.form) is None else self._grammars.follow(form)
        draw, end = _Draw(sampling, follower), None if sampling.ignore_eos else self._vocab - 1
        output = self._plain.generate(
            torch.tensor([list(prompt)]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=sampling.max_new_tokens,
            do_sample=False,
            eos_token_id=end,
            pad_token_id=0,
            logits_processor=transformers.LogitsProcessorList([draw]),
        )
        tokens = output[0, len(prompt) :].tolist()
        if end is not None and tokens[-1] == end:
            tokens.pop()
        return Question(name, tuple(array("i", prompt)), sampling, tuple(tokens)) if draw.steady else None
