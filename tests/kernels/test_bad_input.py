"""Bad input raises with the argument's name, in every implementation: no crash of a worker, no silent garbage."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from attention_cases import CASES, build
from hypothesis import given, settings
from hypothesis import strategies as st

from distkv_dask.kernels import IMPLEMENTATIONS, choose, micro_attention

IMPLEMENTATION_NAMES = [name for name in ("native", "numba", "torch", "reference") if name in IMPLEMENTATIONS]
PREFILL = next(case for case in CASES if case.name == "prefill-causal-after-earlier-tokens")
INT8 = next(case for case in CASES if case.name == "decode-int8")

Arguments = dict[str, Any]


def transposed(pool: torch.Tensor) -> torch.Tensor:
    return pool.transpose(1, 2).contiguous().transpose(1, 2)


WRONG: dict[str, tuple[str, Callable[[Arguments], Any]]] = {
    "q-not-a-tensor": ("q", lambda a: [1.0]),
    "q-wrong-rank": ("q", lambda a: a["q"][0]),
    "q-wrong-heads": ("q", lambda a: a["q"][:, :3]),
    "q-wrong-head-dim": ("q", lambda a: a["q"][..., :32]),
    "q-float64": ("q", lambda a: a["q"].double()),
    "q-other-device": ("q", lambda a: a["q"].to("meta")),
    "k-other-dtype": ("v_pool: expected the dtype of k_pool", lambda a: a["k_pool"].half()),
    "k-wrong-rank": ("k_pool", lambda a: a["k_pool"][0]),
    "k-inner-strides": ("k_pool", lambda a: transposed(a["k_pool"])),
    "k-odd-head-dim": ("k_pool", lambda a: a["k_pool"][..., :63].contiguous()),
    "v-other-shape": ("v_pool", lambda a: a["v_pool"][1:]),
    "v-other-dtype": ("v_pool", lambda a: a["v_pool"].double()),
    "v-other-device": ("v_pool", lambda a: a["v_pool"].to("meta")),
    "tables-int64": ("block_tables", lambda a: a["block_tables"].long()),
    "tables-one-row-short": ("query_offsets|lengths", lambda a: a["block_tables"][:1]),
    "tables-flat": ("block_tables", lambda a: a["block_tables"].flatten()),
    "tables-strided": ("block_tables", lambda a: a["block_tables"].T.contiguous().T),
    "tables-id-too-large": ("block_tables", lambda a: torch.full_like(a["block_tables"], 1000)),
    "tables-id-negative": ("block_tables", lambda a: torch.full_like(a["block_tables"], -1)),
    "lengths-list": ("lengths", lambda a: [90, 40]),
    "lengths-negative": ("lengths", lambda a: a["lengths"] - 100),
    "lengths-beyond-the-table": ("lengths", lambda a: a["lengths"] + 1000),
    "offsets-one-short": ("query_offsets", lambda a: a["query_offsets"][:-1]),
    "offsets-decreasing": ("query_offsets", lambda a: torch.tensor([0, 28, 27], dtype=torch.int32)),
    "offsets-not-from-zero": ("query_offsets", lambda a: torch.tensor([1, 20, 27], dtype=torch.int32)),
    "offsets-missing": ("q: expected one query per row", lambda a: None),
    "starts-missing": ("q_start", lambda a: None),
    "starts-too-many": ("q_start", lambda a: a["q_start"].repeat(2)),
    "first_keys-int64": ("first_keys", lambda a: torch.zeros(27, dtype=torch.int64)),
    "first_keys-one-per-row": ("first_keys", lambda a: torch.zeros(2, dtype=torch.int32)),
    "first_keys-other-device": ("first_keys", lambda a: torch.zeros(27, dtype=torch.int32, device="meta")),
    "soft_cap-zero": ("soft_cap", lambda a: 0.0),
    "soft_cap-infinite": ("soft_cap", lambda a: float("inf")),
    "soft_cap-text": ("soft_cap", lambda a: "30"),
    "v-longer": ("v_pool: expected the shape of k_pool", lambda a: torch.cat([a["v_pool"]] * 2, 3)),
    "v-part-of-other-memory": ("v_pool: the inner three dimensions", lambda a: a["v_pool"][..., :32]),
    "v-odd-length": ("v_pool", lambda a: a["k_pool"][..., :20]),
    "scale-nan": ("scale", lambda a: float("nan")),
    "scale-zero": ("scale", lambda a: 0.0),
    "scale-text": ("scale", lambda a: "0.1"),
    "scale-tensor": ("scale", lambda a: torch.ones(2)),
    "threads-zero": ("threads", lambda a: 0),
    "threads-fraction": ("threads", lambda a: 1.5),
    "scales-without-int8": ("k_scales", lambda a: torch.ones(2, 2)),
}
ARGUMENT = {
    "q": "q", "k": "k_pool", "v": "v_pool", "tables": "block_tables", "lengths": "lengths", "offsets": "query_offsets",
    "starts": "q_start", "scale": "scale", "first_keys": "first_keys", "soft_cap": "soft_cap", "threads": "threads",
    "scales": "k_scales",
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("implementation", IMPLEMENTATION_NAMES)
def test_wrong_argument_is_named(implementation: str, name: str) -> None:
    text, wrong = WRONG[name]
    arguments = build(PREFILL, torch.float32)
    arguments[ARGUMENT[name.split("-")[0]]] = wrong(arguments)
    with pytest.raises((TypeError, ValueError), match=f"^({text})"):
        micro_attention(**arguments, implementation=implementation)


@pytest.mark.parametrize("scales", [None, torch.ones(3), torch.ones(1, 1), torch.ones(11, 2).double()])
def test_int8_pools_need_their_scales(scales: torch.Tensor | None) -> None:
    arguments = build(INT8, torch.float32) | {"v_scales": scales}
    with pytest.raises((TypeError, ValueError), match=r"^v_scales: int8 pools need"):
        micro_attention(**arguments)


def test_starts_without_causal_are_refused_rather_than_ignored() -> None:
    arguments = build(PREFILL, torch.float32) | {"causal": False}
    with pytest.raises(ValueError, match=r"^q_start: only used with causal=True"):
        micro_attention(**arguments)


def test_unknown_implementation_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="torch"):
        micro_attention(**build(PREFILL, torch.float32), implementation="magic")


def test_choice_says_why() -> None:
    choice = choose("cpu", torch.bfloat16, 128, 64)
    assert choice.name in IMPLEMENTATIONS
    assert choice.reason
    assert choose("cuda", torch.bfloat16, 128, 48).name == "torch"
    assert "power of two" in choose("cuda", torch.bfloat16, 128, 48).reason
    assert "up to 256 values" in choose("cuda", torch.bfloat16, 512, 64).reason


integers = st.integers(-(2**31), 2**31 - 1)


def outcome(arguments: Arguments, implementation: str) -> tuple[torch.Tensor, torch.Tensor] | str:
    try:
        return micro_attention(**arguments, implementation=implementation, threads=2)
    except (TypeError, ValueError) as error:
        return str(error).split(":")[0]


@settings(deadline=None, max_examples=150)
@given(
    tables=st.lists(st.integers(-2, 12) | integers, min_size=14, max_size=14),
    lengths=st.lists(st.integers(0, 110) | integers, min_size=2, max_size=2),
    offsets=st.lists(st.integers(0, 27) | integers, min_size=1, max_size=1),
    starts=st.lists(st.integers(-30, 120) | integers, min_size=2, max_size=2),
    first_keys=st.none() | st.lists(st.integers(-5, 120) | integers, min_size=27, max_size=27),
)
def test_any_index_values_give_the_reference_answer_or_its_error(
    tables: list[int], lengths: list[int], offsets: list[int], starts: list[int], first_keys: list[int] | None
) -> None:
    arguments = build(PREFILL, torch.float32)
    for name in ("k_pool", "v_pool"):
        arguments[name] = arguments[name].nan_to_num(0.5)  # here any block may be read
    arguments["block_tables"] = torch.tensor(tables, dtype=torch.int32).view(2, 7)
    arguments["lengths"] = torch.tensor(lengths, dtype=torch.int32)
    arguments["query_offsets"] = torch.tensor([0, *offsets, 27], dtype=torch.int32)
    arguments["q_start"] = torch.tensor(starts, dtype=torch.int32)
    arguments["first_keys"] = None if first_keys is None else torch.tensor(first_keys, dtype=torch.int32)
    expected = outcome(arguments, "reference")
    for implementation in IMPLEMENTATION_NAMES:
        got = outcome(arguments, implementation)
        if isinstance(expected, str) or isinstance(got, str):
            assert isinstance(got, str)
            assert isinstance(expected, str)
        else:
            torch.testing.assert_close(got[0], expected[0], rtol=0, atol=1e-5)
            torch.testing.assert_close(got[1], expected[1], rtol=0, atol=1e-5)


NAMES = {
    "q", "k_pool", "v_pool", "block_tables", "lengths", "query_offsets", "q_start", "first_keys", "k_scales",
    "v_scales",
}  # fmt: skip
DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.int8, torch.int32, torch.int64, torch.bool]
sizes = st.sampled_from([0, 1, 2, 4, 16, 64])
tensors = st.builds(
    lambda shape, dtype: torch.ones(shape, dtype=dtype), st.lists(sizes, max_size=5), st.sampled_from(DTYPES)
)
turned = tensors.filter(lambda tensor: tensor.ndim > 1).map(lambda tensor: tensor.transpose(-1, -2))
anything = tensors | turned | st.none() | st.integers() | st.text(max_size=2)


@settings(deadline=None, max_examples=300)
@given(changes=st.dictionaries(st.sampled_from(sorted(NAMES)), anything, min_size=1, max_size=3), int8=st.booleans())
def test_anything_in_place_of_arguments_is_served_or_refused_by_name(changes: dict[str, Any], int8: bool) -> None:
    arguments = build(INT8 if int8 else PREFILL, torch.float32) | changes
    for implementation in IMPLEMENTATION_NAMES:
        got = outcome(arguments, implementation)
        assert not isinstance(got, str) or set(got.split(", ")) <= NAMES
