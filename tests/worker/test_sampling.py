"""Tokens are chosen as by Hugging Face's generate, and a draw never depends on other sequences in the batch."""

from __future__ import annotations

import decimal
import math
from itertools import product

import pytest
import torch
import transformers
from _models import VOCAB, model_dir, prompt_ids, reference_generate
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import GenerationConfig

from distkv_dask import ModelError
from distkv_dask.errors import DistKVError
from distkv_dask.sampling import SamplingParams
from distkv_dask.worker.model.sampling import Draw, _uniform, probabilities, sample_batch

HISTORY = tuple(prompt_ids(40))


def sample(logits: Tensor, *draw: object) -> int:
    (token,) = sample_batch(logits[None], [Draw(*draw)])
    if isinstance(token, DistKVError):
        raise token
    return token


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
    logits = logits_of(3)
    ours = probabilities(logits[None], [Draw(SamplingParams(**settings, seed=1), 0, HISTORY)])[0]
    theirs = generates(torch.tensor([HISTORY]), logits.double()[None])[0].softmax(-1)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)


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
    rows = [Draw(one, 40 + at, HISTORY if one.repetition_penalty != 1 else ()) for at, one in enumerate(params)]
    alone = [sample(row, *draw) for row, draw in zip(logits, rows, strict=True)]
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
    with pytest.raises(DistKVError, match="seed"):
        sample(logits_of(0), SamplingParams(temperature=1), 0)


EXTREMES = [
    {"temperature": 1e-40},
    {"temperature": 5e-324},
    {"temperature": 1e-300, "repetition_penalty": 1e30},
    {"temperature": 1.0, "top_p": 1e-300},
    {"temperature": 1.0, "min_p": 1.0},
    {"temperature": 1e38, "top_k": 1},
    {"temperature": 1e308, "top_p": 1e-300},
    {"temperature": 1.0, "top_p": 5e-324, "top_k": 10**30},
]


@pytest.mark.parametrize("settings", EXTREMES, ids=str)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e37])
def test_parameters_that_leave_one_token_draw_the_greedy_one(settings: dict, scale: float) -> None:
    logits = torch.randn(49152, generator=torch.Generator().manual_seed(1)) * scale
    for seed in range(20):
        assert sample(logits, SamplingParams(**settings, seed=seed), seed) == int(logits.argmax())


@pytest.mark.parametrize("temperature", [1e38, 1e300, 1.7e308])
def test_a_huge_temperature_draws_evenly_from_what_is_allowed(temperature: float) -> None:
    logits = torch.tensor([0.0, -torch.inf, 80.0, -3.0, 2.0])
    even = torch.tensor([0.25, 0, 0.25, 0.25, 0.25], dtype=torch.float64)
    found = probabilities(logits[None], [Draw(SamplingParams(temperature=temperature, seed=0), 0)])[0]
    torch.testing.assert_close(found, even, rtol=0, atol=1e-12)
    assert found[1] == 0


@pytest.mark.parametrize(("penalty", "right"), [(1e30, 3), (1e300, 3), (1.7e308, 3), (1e-30, 1), (5e-324, 1)])
@pytest.mark.parametrize("temperature", [0.0, 1e-40, 1.0])
def test_an_extreme_penalty_forbids_or_forces_what_was_there(penalty: float, right: int, temperature: float) -> None:
    logits = torch.tensor([-9.0, 7.0, 5.0, 4.0])
    params = SamplingParams(temperature=temperature, repetition_penalty=penalty, seed=3)
    assert [sample(logits, params, at, (0, 1, 2)) for at in range(10)] == [right] * 10


FINITE = st.floats(-(2.0**120), 2.0**120, width=32)
ANY = st.one_of(st.floats(5e-324, 1.7e308), st.sampled_from([5e-324, 1e-300, 1e-40, 1e-5, 1.0, 1e38, 1.7e308]))


@given(
    st.lists(st.one_of(FINITE, st.floats(-20, 20, width=32), st.just(-math.inf)), min_size=1, max_size=12).filter(
        lambda logits: max(logits) > -math.inf
    ),
    st.one_of(st.just(0.0), ANY),
    st.one_of(st.just(1.0), ANY),
    st.floats(5e-324, 1.0),
    st.floats(0.0, 1.0),
    st.integers(0, 2**70),
    st.integers(0, 2**63 - 1),
)
def test_any_parameters_draw_a_token_that_the_model_allows(
    logits: list[float], temperature: float, penalty: float, top_p: float, min_p: float, top_k: int, seed: int
) -> None:
    params = SamplingParams(
        temperature=temperature, repetition_penalty=penalty, top_p=top_p, min_p=min_p, top_k=top_k, seed=seed
    )
    token = sample(torch.tensor(logits), params, seed % 1000, (0,))
    assert logits[token] > -math.inf


@given(
    st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=6),
    st.one_of(st.floats(1e-30, 1e30), st.sampled_from([1e-40, 1e-3, 1.0, 1e38])),
    st.sampled_from([1e-30, 0.5, 1.0, 2.0, 1e30]),
)
def test_probabilities_are_those_of_exact_arithmetic(logits: list[float], temperature: float, penalty: float) -> None:
    context = decimal.Context(prec=60, Emin=decimal.MIN_EMIN, Emax=decimal.MAX_EMAX)
    exact = [decimal.Decimal(logit) for logit in logits]
    factor = decimal.Decimal(penalty)
    exact[0] = context.multiply(exact[0], factor) if exact[0] < 0 else context.divide(exact[0], factor)
    top = max(exact)
    weights = [context.exp(context.divide(context.subtract(one, top), decimal.Decimal(temperature))) for one in exact]
    right = [float(weight / sum(weights)) for weight in weights]
    params = SamplingParams(temperature=temperature, repetition_penalty=penalty)
    (found,) = probabilities(torch.tensor([logits]), [Draw(params, 0, (0,))])
    torch.testing.assert_close(found, torch.tensor(right, dtype=torch.float64), rtol=1e-9, atol=1e-300)


BROKEN = [[math.nan, 1.0, 2.0], [math.inf, 1.0, 2.0], [-math.inf] * 3, [math.nan] * 3, [math.inf, -math.inf, math.nan]]


@pytest.mark.parametrize("broken", BROKEN, ids=str)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_fail_their_row_alone(broken: list[float], temperature: float) -> None:
    params = SamplingParams(temperature=temperature, seed=1)
    logits = torch.tensor([[0.0, 5.0, 1.0], broken, [2.0, 0.0, -math.inf]])
    first, failed, last = sample_batch(logits, [Draw(params, 4), Draw(params, 9), Draw(SamplingParams(), 4)])
    assert first in range(3)
    assert last == 0
    assert isinstance(failed, ModelError)
    assert "position 9" in str(failed)
    assert "float32" in str(failed)


def test_whatever_a_row_raises_is_the_error_of_that_row() -> None:
    class Broken:
        def forbidden(self, vocab: int) -> Tensor:
            raise RuntimeError("fuel")

    draws = [Draw(SamplingParams(), 0), Draw(SamplingParams(), 0, (), Broken()), Draw(SamplingParams(temperature=1), 0)]
    draws.append(Draw(SamplingParams(repetition_penalty=2), 0, (-7,)))
    right, *failed = sample_batch(torch.arange(4.0).repeat(4, 1), draws)
    assert right == 3
    assert all(isinstance(one, DistKVError) for one in failed)


def test_draws_do_not_depend_on_the_default_dtype_that_a_model_being_loaded_sets() -> None:
    flat = torch.zeros(VOCAB)
    params = SamplingParams(temperature=1, seed=3)
    right = [sample(flat, params, position) for position in range(40)]
    try:
        torch.set_default_dtype(torch.bfloat16)
        assert [sample(flat, params, position) for position in range(40)] == right
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_penalty_counts_once_for_a_token_that_was_there_twice() -> None:
    (found,) = probabilities(
        torch.tensor([[2.0, 1.0]]), [Draw(SamplingParams(temperature=1, repetition_penalty=2), 0, (0, 0))]
    )
    assert found.tolist() == [0.5, 0.5]


def test_any_number_of_best_tokens_may_be_asked_for() -> None:
    params = SamplingParams(temperature=1, seed=1, top_k=10**400)
    logits = torch.stack([logits_of(at) for at in range(20)])
    some = [Draw(params, at) for at in range(20)]
    plain = [Draw(SamplingParams(temperature=1, seed=1), at) for at in range(20)]
    assert sample_batch(logits, some) == sample_batch(logits, plain)
