"""Tokens are chosen as Hugging Face's generate does, and a draw never depends on who else is in the batch."""

from __future__ import annotations

from itertools import product

import pytest
import torch
import transformers
from _models import VOCAB, model_dir, prompt_ids, reference_generate
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import GenerationConfig

from distkv_dask.types import SamplingParams
from distkv_dask.worker.sampling import _filters, _uniform, sample, sample_batch

HISTORY = tuple(prompt_ids(40))


@pytest.fixture(scope="module")
def plain() -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(model_dir("llama-gqa"), dtype=torch.float32)


def logits_of(seed: int) -> Tensor:
    return torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed)) * 4


SETTINGS = [
    dict(zip(("temperature", "top_k", "top_p", "min_p", "repetition_penalty"), values, strict=True))
    for values in product((0.6, 1.0, 1.7), (0, 1, 25), (1.0, 0.8), (0.0, 0.05), (1.0, 1.3))
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: "-".join(map(str, settings.values())))
def test_filters_are_those_that_generate_builds(plain: transformers.PreTrainedModel, settings: dict) -> None:
    config = GenerationConfig(do_sample=True, **(settings | {"min_p": settings["min_p"] or None}))
    generates = plain._get_logits_processor(config, input_ids_seq_length=len(HISTORY))
    ids, scores = torch.tensor([HISTORY]), logits_of(3)[None]
    ours = _filters(SamplingParams(**settings, seed=1))(ids, scores.clone())
    torch.testing.assert_close(ours, generates(ids, scores.clone()), rtol=0, atol=0)


def test_greedy_with_repetition_penalty_equals_generate(plain: transformers.PreTrainedModel) -> None:
    prompt = prompt_ids(12, 4)
    (free,) = reference_generate(model_dir("llama-gqa"), [prompt], 10)
    output = plain.generate(
        torch.tensor([prompt]), max_new_tokens=10, do_sample=False, repetition_penalty=0.6, eos_token_id=None
    )
    expected, tokens = output[0, 12:].tolist(), list(prompt)
    for position in range(12, 22):
        row = plain(torch.tensor([tokens])).logits[0, -1].detach()
        tokens.append(sample(row, SamplingParams(repetition_penalty=0.6), position, tuple(tokens)))
    assert tokens[12:] == expected
    assert tokens[12:] != free.tokens, "the penalty must matter"


def test_greedy_is_the_first_of_the_largest() -> None:
    assert sample(torch.tensor([0.0, 2.0, 2.0, 1.0]), SamplingParams(), 5) == 1


def test_batch_gives_each_row_what_it_gets_alone() -> None:
    params = [
        SamplingParams(),
        SamplingParams(temperature=0.8, seed=4, top_p=0.9),
        SamplingParams(repetition_penalty=1.5),
        SamplingParams(temperature=1.5, seed=4),
        SamplingParams(),
    ]
    logits = torch.stack([logits_of(at) for at in range(5)])
    rows = [(one, 40 + at, HISTORY if one.repetition_penalty != 1 else ()) for at, one in enumerate(params)]
    alone = [sample(row, *arguments) for row, arguments in zip(logits, rows, strict=True)]
    assert sample_batch(logits, rows) == alone
    assert sample_batch(logits.flip(0), rows[::-1]) == alone[::-1]


def test_draws_of_a_request_differ_by_position_and_by_seed() -> None:
    flat = torch.zeros(VOCAB)
    by_position = [sample(flat, SamplingParams(temperature=1, seed=0), position) for position in range(50)]
    by_seed = [sample(flat, SamplingParams(temperature=1, seed=seed), 0) for seed in range(50)]
    assert len(set(by_position)) > 40
    assert len(set(by_seed)) > 40
    assert by_position == [sample(flat, SamplingParams(temperature=1, seed=0), position) for position in range(50)]


def test_draws_follow_the_probabilities() -> None:
    probabilities = torch.tensor([0.5, 0.0, 0.3, 0.15, 0.05])
    draws = [sample(probabilities.log(), SamplingParams(temperature=1, seed=9), at) for at in range(4000)]
    found = torch.bincount(torch.tensor(draws), minlength=5) / len(draws)
    assert found[1] == 0
    torch.testing.assert_close(found, probabilities, rtol=0, atol=0.03)


@given(st.integers(0, 2**63 - 1), st.integers(0, 10**7))
def test_uniform_number_is_never_zero(seed: int, position: int) -> None:
    assert 0 < _uniform(seed, position) <= 1


@given(st.integers(0, 10**6), st.sets(st.integers(0, 9), min_size=1))
def test_tokens_of_probability_zero_are_never_drawn(position: int, allowed: set[int]) -> None:
    logits = torch.full((10,), float("-inf"))
    logits[list(allowed)] = 0
    assert sample(logits, SamplingParams(temperature=1, seed=0), position) in allowed


def test_draw_without_a_seed_is_refused() -> None:
    with pytest.raises(ValueError, match="seed"):
        sample(logits_of(0), SamplingParams(temperature=1), 0)
