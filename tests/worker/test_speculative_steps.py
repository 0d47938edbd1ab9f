"""Speculative steps give the tokens of one process, whatever was proposed and wherever the KV is."""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest
import torch
from _channels import Way
from _fakes import GREEDY, NEW, PROMPT, ROOM, Fleet, Recorder, fleet, generate, loaded, reference, state
from _models import model_dir, prompt_ids, reference_generate

from distkv_dask.gang import PrefillChunk, SequenceState, Speculated
from distkv_dask.placement import Span
from distkv_dask.sampling import SamplingParams


class Told:
    """Proposes what a test says: right tokens up to some position, a wrong one there, and right ones after it."""

    def __init__(self, right: Mapping[int, Sequence[int]], tries: Sequence[tuple[int, int]]) -> None:
        self._right = right
        self._tries = itertools.cycle(tries)
        """Numbers of tokens that each step proposes for each sequence, and which of them is wrong."""
        self._at: dict[int, int] = {}
        self.rows: list[int] = []

    def begin_window(self, batch: Sequence[SequenceState]) -> Told:
        self._at = {one.sequence: one.length - PROMPT + 1 for one in batch}
        return self

    def propose(self, room: Mapping[int, int]) -> dict[int, list[int]]:
        drafts = {}
        for sequence, most in room.items():
            count, wrong = next(self._tries)
            at = self._at[sequence]
            tokens = list(self._right[sequence][at : at + min(count, most)])
            if wrong < len(tokens):
                tokens[wrong] = (tokens[wrong] + 1) % 100
            drafts[sequence] = tokens
        self.rows.append(sum(1 + len(one) for one in drafts.values()))
        return drafts

    def learn(self, seconds: float, taken: Mapping[int, Sequence[int]]) -> None:
        for sequence, tokens in taken.items():
            self._at[sequence] += len(tokens)


def tell(made: Fleet, right: Mapping[int, Sequence[int]], *tries: tuple[int, int]) -> Told:
    told = Told(right, tries)
    for member in made.members.values():
        member.runtime.speculation = told
    return told


SPLITS = {
    "all at home": [("w0", ROOM)],
    "all at a holder": [("w1", ROOM)],
    "tail at home": [("w1", 48), ("w0", ROOM)],
    "tail moves on while decoding": [("w1", 40), ("w0", PROMPT - 40 + 4), ("w2", 4), ("w1", 2), ("w0", ROOM)],
    "all in turns, the tail too": [(f"w{at % 3}", 8) for at in range(ROOM // 8 + 1)],
}


@pytest.mark.parametrize("family", ["llama-gqa", "gemma2-short"])
@pytest.mark.parametrize("split", SPLITS)
def test_wherever_the_wrong_token_stands_tokens_and_logits_are_those_of_one_process(family: str, split: str) -> None:
    model, right = Recorder(loaded(family)), reference(family)
    with fleet(model, 3, block_tokens=2) as made:
        for wrong in (0, 1, 3, 9):
            tell(made, {1: right.tokens}, (4, wrong), (1, wrong), (0, 0), (6, wrong))
            placement = made.place(1, *SPLITS[split])
            assert generate(made, placement, "w0") == right.tokens
            made.release_sequence(1)


def test_the_logits_behind_right_tokens_are_those_of_one_process() -> None:
    model, right = Recorder(loaded("llama-gqa")), reference("llama-gqa")
    with fleet(model, 2) as made:
        tell(made, {1: right.tokens}, (NEW, NEW))
        placement = made.place(1, ("w1", 40), ("w0", ROOM))
        first = made.prefill(1, placement, prompt_ids(PROMPT))
        result, _ = made.decode("w0", [state(1, placement, PROMPT, first, NEW - 1)], 1)
        assert (result.tokens[1], result.steps) == (right.tokens[1:], 1)
        assert result.finished == {1: "length"}
        assert result.speculated == {1: Speculated(NEW - 2, NEW - 2)}
        assert torch.allclose(model.logits[-1], right.logits[1:], atol=1e-4, rtol=1e-4)


WARM = SamplingParams(temperature=1.5, top_p=0.9, seed=5, ignore_eos=True)


@pytest.mark.parametrize(
    "sampling", [WARM, replace(WARM, repetition_penalty=1.3), replace(GREEDY, repetition_penalty=2)]
)
def test_draws_with_and_without_penalty_depend_on_seed_and_position_alone(sampling: SamplingParams) -> None:
    with fleet(loaded("llama-gqa"), 2) as made:
        placement = made.place(1, ("w1", 40), ("w0", ROOM))
        first = made.prefill(1, placement, prompt_ids(PROMPT))
        one = SequenceState(1, placement, PROMPT, first, NEW, sampling, array("i", prompt_ids(PROMPT)), (first,))
        right, _ = made.decode("w0", [one], NEW)
        for wrong in range(4):
            tell(made, {1: [first, *right.tokens[1]]}, (3, wrong), (4, 9), (0, 0))
            again, _ = made.decode("w0", [one], NEW)
            assert again.tokens == right.tokens
            assert again.steps < right.steps
            assert again.speculated[1].accepted == right.steps - again.steps


def test_an_end_of_sequence_token_among_those_that_were_tried_ends_the_sequence() -> None:
    tokens = reference("llama-gqa").tokens
    at = next(at for at in range(3, NEW) if tokens[at] not in tokens[:at])
    model = Recorder(loaded("llama-gqa"))
    model.eos_token_ids = frozenset({tokens[at]})
    with fleet(model, 2) as made:
        tell(made, {1: tokens}, (NEW, NEW))
        placement = made.place(1, ("w1", 40), ("w0", ROOM))
        first = made.prefill(1, placement, prompt_ids(PROMPT))
        result, left = made.decode("w0", [state(1, placement, PROMPT, first, NEW - 1, ignore_eos=False)], 9)
        assert (result.tokens, result.finished, result.steps, left) == ({1: tokens[1:at]}, {1: "stop"}, 1, [])


class Allowing:
    """A follower that counts its tokens, and allows one more token of the vocabulary each time."""

    def __init__(self, right: Sequence[int], generated: Sequence[int]) -> None:
        self._right = right
        self._told = list(generated)

    def forbidden(self, vocab: int) -> torch.Tensor:
        assert self._told == self._right[: len(self._told)], "it was told of tokens that were not drawn"
        return torch.arange(vocab) == self._right[len(self._told)] + 1

    def take_token(self, token: int) -> None:
        self._told.append(token)


def test_a_schema_follows_the_tokens_that_were_drawn_and_no_others() -> None:
    model, right = Recorder(loaded("llama-gqa")), reference("llama-gqa").tokens
    model.follower = lambda sampling, generated=(): Allowing(right, generated) if sampling.schema else None
    with fleet(model, 2) as made:
        placement = made.place(1, ("w1", 40), ("w0", ROOM))
        first = made.prefill(1, placement, prompt_ids(PROMPT))
        one = replace(state(1, placement, PROMPT, first, NEW - 2, schema="{}", ignore_eos=False), generated=(first,))
        for wrong in (0, 2, 9):
            tell(made, {1: right}, (3, wrong), (5, wrong))
            assert made.decode("w0", [one], NEW)[0].tokens == {1: right[1:-1]}


@pytest.mark.parametrize("deterministic", [False, True])
def test_questions_on_one_document_try_different_numbers_of_tokens(way: Way, deterministic: bool) -> None:
    """At the document's holder their queries are one row, so that its KV is read once."""
    prompts = {number: [*prompt_ids(48), *prompt_ids(PROMPT - 48, number)] for number in (1, 2, 3)}
    with fleet(loaded("gemma2-short"), 3, way, deterministic=deterministic) as made:
        shared = made.place(9, ("w1", 32), ("w2", 16))
        made.prefill(9, shared, prompt_ids(48))
        batch, right = [], {}
        for number, prompt in prompts.items():
            for worker, stop in (("w1", 48 + 16), ("w0", ROOM)):
                made.members[worker].runtime.reserve(number, 48 if worker == "w1" else 64, stop)
            own = (Span("w1", 48, 64), Span("w0", 64, ROOM))
            placement = (*(replace(span, document=9) for span in shared), *own)
            gang = made.gang("w0", ["w1", "w2"])
            chunk = PrefillChunk(gang, number, placement, 48, tuple(prompt[48:]), GREEDY)
            first = made.run(gang, lambda runtime, chunk=chunk: runtime.prefill(chunk)).token
            batch.append(state(number, placement, PROMPT, first, NEW - 1))
            right[number] = [first]
        plain, _ = made.decode("w0", batch, NEW)
        assert plain.tokens[1] == reference_generate(model_dir("gemma2-short"), [prompts[1]], NEW)[0].tokens[1:]
        right = {number: [*right[number], *plain.tokens[number]] for number in right}
        told = tell(made, right, (3, 1), (0, 0), (4, 9), (2, 0), (1, 1))
        tried, _ = made.decode("w0", batch, NEW)
        assert tried.tokens == plain.tokens
        assert tried.steps < plain.steps
        assert max(told.rows) > len(batch)
