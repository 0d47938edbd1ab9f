"""SamplingParams: valid values, and the errors for others."""

from __future__ import annotations

import pickle
from dataclasses import replace

import numpy as np
import pytest

from distkv_dask.errors import InvalidRequestError
from distkv_dask.placement import Span
from distkv_dask.sampling import SamplingParams

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("name", "given", "kept"),
    [
        ("max_new_tokens", 1, 1),
        ("max_new_tokens", np.int64(7), 7),
        ("temperature", 0, 0.0),
        ("temperature", np.float32(0.5), 0.5),
        ("top_p", 1, 1.0),
        ("top_p", 1e-9, 1e-9),
        ("top_k", 0, 0),
        ("min_p", 0, 0.0),
        ("min_p", 1, 1.0),
        ("repetition_penalty", 0.5, 0.5),
        ("seed", None, None),
        ("seed", 0, 0),
        ("seed", 2**63 - 1, 2**63 - 1),
        ("stop", "\n", ("\n",)),
        ("stop", ["a", "b"], ("a", "b")),
        ("stop", ("a",), ("a",)),
        ("stop", [], ()),
        ("ignore_eos", True, True),
    ],
)
def test_an_allowed_value_is_kept_in_its_declared_type(name, given, kept):
    value = getattr(SamplingParams(**{name: given}), name)
    assert value == kept
    assert type(value) is type(kept)


@pytest.mark.parametrize(
    ("name", "values", "allowed"),
    [
        ("max_new_tokens", [0, -1, 1.0, 1.5, NAN, "8", None, True], "a whole number of at least 1"),
        ("temperature", [-0.1, NAN, INF, -INF, "hot", None, False, 10**400], "a finite number at least 0"),
        ("top_p", [0, -0.1, 1.1, NAN, None, True], "a finite number above 0 and at most 1"),
        ("top_k", [-1, 1.0, NAN, None, True], "a whole number of at least 0"),
        ("min_p", [-0.1, 1.1, NAN, None, True], "a finite number from 0 to 1"),
        ("repetition_penalty", [0, -1, NAN, INF, None, True], "a finite number above 0"),
        ("seed", [-1, 2**63, 0.5, "x", True], f"a whole number from 0 to {2**63 - 1}"),
        ("stop", ["", [""], [1], None, 3, b"x"], "a string that is not empty, or a list of such strings"),
        ("ignore_eos", [1, "yes", None], "True or False"),
        ("regex", ["", ["a"], 1, b"a"], "a text that is not empty"),
        ("grammar", ["", ["a"], 1, b"a"], "a text that is not empty"),
        ("embed", ["", "max", 1, True, ["mean"]], '"mean" or "last"'),
    ],
)
def test_a_wrong_value_names_parameter_value_and_range(name, values, allowed):
    for value in values:
        with pytest.raises(InvalidRequestError) as refusal:
            SamplingParams(**{name: value})
        assert str(refusal.value) == f"{name} is {value!r}, but must be {allowed}."


@pytest.mark.parametrize(
    "together",
    [
        {"regex": "a", "grammar": 'start: "a"'},
        {"schema": {}, "regex": "a"},
        {"schema": {}, "regex": "a", "grammar": 'start: "a"'},
        {"regex": "a", "stop": "b"},
        {"grammar": 'start: "a"', "ignore_eos": True},
        {"schema": {}, "stop": "b"},
        {"normalize": True},
        {"embed": "mean", "max_new_tokens": 5},
        {"embed": "mean", "choices": ["a"]},
        {"embed": "mean", "schema": {}},
        {"embed": "last", "regex": "a"},
        {"embed": "last", "quotes": True},
        {"embed": "last", "temperature": 1, "n": 2},
        {"embed": "last", "stop": "b"},
        {"embed": "last", "logprobs": 0},
        {"embed": "last", "prompt_logprobs": 0},
        {"embed": "last", "seed": 1},
    ],
)
def test_what_contradicts_itself_is_refused(together):
    with pytest.raises(InvalidRequestError, match="leave out"):
        SamplingParams(**together)


def test_an_embedding_has_no_answer_and_takes_only_the_priority_from_others():
    params = SamplingParams(temperature=1.0, stop="x", max_new_tokens=7, priority=3)
    assert params.updated({"top_k": 2}) == replace(params, top_k=2)
    embed = params.updated({"embed": "mean", "normalize": True})
    assert embed == SamplingParams(embed="mean", normalize=True, priority=3)
    assert (embed.new_tokens, params.new_tokens) == (0, 7)
    assert replace(embed, priority=1) == SamplingParams(embed="mean", normalize=True, priority=1)


def test_params_travel_and_compare_as_values():
    params = SamplingParams(temperature=0.7, seed=1, stop=["."])
    assert pickle.loads(pickle.dumps(params)) == params
    assert hash(params) == hash(SamplingParams(temperature=0.7, seed=1, stop=(".",)))


@pytest.mark.parametrize(("length", "filled"), [(0, 0), (4, 0), (5, 1), (8, 4), (100, 4)])
def test_a_span_counts_only_tokens_below_the_length(length, filled):
    assert Span("tcp://a", 4, 8).filled(length) == filled
