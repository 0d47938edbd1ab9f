"""Partial results merge to the answer of one pass, however the keys are divided and in whatever order they arrive."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distkv_dask.kernels import IMPLEMENTATIONS, merge, merge_into, micro_attention

TOKENS, HEADS, D = 3, 4, 16
FAST = [name for name in ("native", "torch") if name in IMPLEMENTATIONS]


def partials_of(
    implementation: str, cuts: list[int], total: int, seed: int
) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    q = torch.randn(TOKENS, HEADS, D, generator=rng) * 3
    k, v = torch.randn(2, total, HEADS, 1, D, generator=rng)
    edges = [0, *sorted(cuts), total]

    def attend(first: int, last: int, implementation: str) -> tuple[torch.Tensor, torch.Tensor]:
        table = torch.arange(first, last, dtype=torch.int32)[None]
        return micro_attention(
            q,
            k,
            v,
            table,
            torch.tensor([last - first], dtype=torch.int32),
            scale=D**-0.5,
            query_offsets=torch.tensor([0, TOKENS], dtype=torch.int32),
            implementation=implementation,
        )

    parts = [attend(a, b, implementation) for a, b in pairwise(edges)]
    return parts, attend(0, total, "reference")


@pytest.mark.parametrize("implementation", FAST)
@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 40), max_size=8), st.randoms(use_true_random=False), st.integers(0, 1000))
def test_any_partition_in_any_order_gives_the_same_answer(
    implementation: str, cuts: list[int], order: Any, seed: int
) -> None:
    parts, (out, lse) = partials_of(implementation, cuts, 40, seed)
    order.shuffle(parts)
    merged_out, merged_lse = merge(parts)
    torch.testing.assert_close(merged_out, out, rtol=0, atol=1e-5)
    torch.testing.assert_close(merged_lse, lse, rtol=0, atol=1e-5)


def test_merging_nothing_with_nothing_stays_nothing() -> None:
    out, lse = torch.zeros(TOKENS, HEADS, D), torch.full((TOKENS, HEADS), -torch.inf)
    merge_into(out, lse, torch.zeros_like(out), lse.clone())
    assert not out.any()
    assert (lse == -torch.inf).all()


def test_an_empty_partial_changes_no_bit() -> None:
    out, lse = torch.randn(TOKENS, HEADS, D), torch.randn(TOKENS, HEADS)
    before = out.clone(), lse.clone()
    merge_into(out, lse, torch.zeros_like(out), torch.full_like(lse, -torch.inf))
    assert torch.equal(out, before[0])
    assert torch.equal(lse, before[1])


@pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "strided"])
def test_index_merges_only_its_tokens(strided: bool) -> None:
    out, lse = torch.randn(5, HEADS, D), torch.randn(5, HEADS)
    if strided:
        out = out.repeat(1, 1, 2)[..., :D]
    part_out, part_lse = torch.randn(2, HEADS, D), torch.randn(2, HEADS)
    index = torch.tensor([4, 1])
    expected = merge([(out[index], lse[index]), (part_out, part_lse)])
    untouched = out[[0, 2, 3]].clone()
    merge_into(out, lse, part_out, part_lse, index)
    torch.testing.assert_close(out[index], expected[0])
    torch.testing.assert_close(lse[index], expected[1])
    assert torch.equal(out[[0, 2, 3]], untouched)


def test_logits_far_apart_do_not_overflow() -> None:
    pairs = [(torch.full((1, 1, 8), x), torch.full((1, 1), y)) for x, y in ((1.0, -1e4), (2.0, 1e4), (3.0, 1e4))]
    out, lse = merge(pairs)
    torch.testing.assert_close(out, torch.full((1, 1, 8), 2.5))
    torch.testing.assert_close(lse, torch.full((1, 1), 1e4 + 0.6931))


@pytest.mark.parametrize(
    ("index", "error", "text"),
    [
        (torch.tensor([0, 0]), ValueError, "distinct"),
        (torch.tensor([0, 5]), ValueError, "distinct values from 0 to 4"),
        (torch.tensor([-1, 0]), ValueError, "distinct values from 0 to 4"),
        (torch.tensor([0, 1], dtype=torch.int32), TypeError, "int64"),
        (torch.tensor([0, 1, 2]), ValueError, "part_out"),
    ],
)
def test_bad_index_is_named(index: torch.Tensor, error: type[Exception], text: str) -> None:
    out, lse = torch.zeros(5, HEADS, D), torch.zeros(5, HEADS)
    with pytest.raises(error, match=text):
        merge_into(out, lse, torch.zeros(2, HEADS, D), torch.zeros(2, HEADS), index)


def test_no_partials_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one"):
        merge([])
