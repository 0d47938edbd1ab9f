"""Prepared calls answer like checked ones, layer after layer, and refuse tensors that they were not prepared for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_cases import CASES, Case, build

from distkv_dask.kernels import (
    IMPLEMENTATIONS,
    PreparedAttention,
    PreparedLayers,
    PreparedMerge,
    choose,
    merge,
    micro_attention,
    prepared,
)

FLOAT_CASES = [case for case in CASES if not case.int8]
DECODE, PREFILL = FLOAT_CASES[2], next(case for case in CASES if case.queries is not None)


def prepare(arguments: dict[str, Any]) -> PreparedAttention:
    """A prepared call for the tensors of a case."""
    fixed = {name: value for name, value in arguments.items() if name not in ("q", "scale")}
    return PreparedAttention(*arguments["q"].shape[:2], **fixed)


@pytest.fixture(params=["native", "numba", "torch"])
def served(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Name of the implementation that prepared calls get."""
    case = ("cpu", torch.float32, 64, 16)
    if request.param != choose(*case).name:
        if request.param not in IMPLEMENTATIONS:
            pytest.skip(f"{request.param} is not available here")
        choice = choose(*case, request.param)
        monkeypatch.setattr(prepared, "choose", lambda *_: choice)
    return str(request.param)


@pytest.mark.parametrize("case", FLOAT_CASES, ids=str)
def test_every_layer_gets_the_answer_of_a_checked_call(served: str, case: Case) -> None:
    arguments = build(case, torch.float32)
    attention = prepare(arguments)
    for scale in (arguments["scale"], 0.5):
        q, k, v = torch.randn_like(arguments["q"]), arguments["k_pool"].clone(), arguments["v_pool"]
        k = torch.empty_strided(k.shape, v.stride()).copy_(k)
        attention(q, k, v, scale)
        out, lse = micro_attention(**arguments | {"q": q, "k_pool": k, "scale": scale}, implementation=served)
        assert torch.equal(attention.out, out)
        assert torch.equal(attention.lse, lse)
        assert torch.equal(attention.result, torch.cat([out.flatten(), lse.flatten()]))


def test_lengths_may_grow_between_calls() -> None:
    arguments = build(DECODE, torch.float32)
    attention = prepare(arguments)
    arguments["lengths"].fill_(3)
    arguments["block_tables"][1, 0] = 0
    attention(arguments["q"], arguments["k_pool"], arguments["v_pool"], 1.0)
    out, lse = micro_attention(**arguments | {"scale": 1.0})
    assert torch.equal(attention.out.nan_to_num(), out.nan_to_num())
    assert torch.equal(attention.lse.nan_to_num(), lse.nan_to_num())
    arguments["lengths"][0] = 10_000
    with pytest.raises(ValueError, match="lengths"):
        attention(arguments["q"], arguments["k_pool"], arguments["v_pool"], 1.0)


@pytest.mark.parametrize(
    ("name", "change", "error"),
    [
        ("q", lambda q: q[:-1], ValueError),
        ("q", lambda q: q[:, :2], ValueError),
        ("q", lambda q: q.to(torch.bfloat16), TypeError),
        ("k_pool", lambda k: k[:-1], ValueError),
        ("v_pool", lambda v: v.contiguous(), ValueError),
        ("scale", lambda _: -1.0, ValueError),
    ],
)
def test_tensors_of_another_form_never_reach_the_core(name: str, change: Any, error: type[Exception]) -> None:
    arguments = build(DECODE, torch.float32)
    attention = prepare(arguments)
    given = {part: arguments[part] for part in ("q", "k_pool", "v_pool", "scale")}
    with pytest.raises(error, match=name):
        attention(**given | {name: change(given[name])})


def test_results_are_written_where_the_caller_wants_them(served: str) -> None:
    arguments = build(DECODE, torch.float32)
    fixed = {name: value for name, value in arguments.items() if name not in ("q", "scale")}
    tokens, heads, d = arguments["q"].shape
    memory = torch.zeros(2, tokens * heads * (d + 1))
    attention = PreparedAttention(tokens, heads, **fixed, result=memory[1])
    attention(arguments["q"], arguments["k_pool"], arguments["v_pool"], arguments["scale"])
    out, lse = micro_attention(**arguments, implementation=served)
    assert torch.equal(memory[1], torch.cat([out.flatten(), lse.flatten()]))
    assert not memory[0].any()
    with pytest.raises(ValueError, match=r"^result: expected float32"):
        PreparedAttention(tokens, heads, **fixed, result=memory)


def test_queries_with_gaps_are_read_right() -> None:
    arguments = build(PREFILL, torch.float32)
    attention = prepare(arguments)
    q = arguments["q"].repeat(1, 1, 2)[..., : arguments["q"].shape[2]]
    attention(q, arguments["k_pool"], arguments["v_pool"], arguments["scale"])
    out, _ = micro_attention(**arguments)
    assert torch.equal(attention.out, out)


@pytest.mark.parametrize("index", [None, torch.tensor([2, 0, 1]), torch.tensor([1])], ids=["all", "order", "one"])
def test_a_prepared_merge_reads_the_values_of_its_tensors_anew(index: torch.Tensor | None) -> None:
    out, lse, count = torch.empty(3, 2, 8), torch.empty(3, 2), 3 if index is None else len(index)
    part_out, part_lse = torch.empty(count, 2, 8), torch.empty(count, 2)
    combine = PreparedMerge(out, lse, part_out, part_lse, index)
    at = slice(None) if index is None else index
    for _ in range(2):
        for tensor in (out, lse, part_out, part_lse):
            tensor.normal_()
        expected = merge([(out[at], lse[at]), (part_out, part_lse)])
        combine()
        torch.testing.assert_close(out[at], expected[0])
        torch.testing.assert_close(lse[at], expected[1])


def test_a_prepared_merge_names_a_bad_index() -> None:
    out, lse = torch.zeros(3, 2, 8), torch.zeros(3, 2)
    with pytest.raises(ValueError, match="part_out"):
        PreparedMerge(out, lse, out[:1], lse[:1])
    with pytest.raises(ValueError, match="distinct"):
        PreparedMerge(out, lse, out[:2], lse[:2], torch.tensor([1, 1]))()


def test_new_kv_is_stored_and_seen_in_every_layer(served: str) -> None:
    pool, heads, d = torch.randn(5, 2, 2, 2, 16, 64), 4, 64
    k_layers, v_layers = [pool[:, at, 0] for at in range(2)], [pool[:, at, 1] for at in range(2)]
    tables, lengths = torch.tensor([[3, 1], [2, 0]], dtype=torch.int32), torch.tensor([18, 5], dtype=torch.int32)
    blocks, offsets = torch.tensor([1, 2]), torch.tensor([1, 4])
    attention = PreparedAttention(2, heads, k_layers[0], v_layers[0], tables, lengths)
    layers = PreparedLayers(attention, k_layers, v_layers, blocks, offsets)
    assert (layers.native is not None) == (served == "native")
    for layer in range(2):
        q, (k, v) = torch.randn(2, heads, d), torch.randn(2, 2, 2, d)
        expected = pool.clone()
        for row in range(2):
            expected[blocks[row], layer, 0, :, offsets[row]] = k[row]
            expected[blocks[row], layer, 1, :, offsets[row]] = v[row]
        layers(layer, q, k, v, 0.125)
        assert torch.equal(pool, expected)
        out, lse = micro_attention(
            q, expected[:, layer, 0], expected[:, layer, 1], tables, lengths, scale=0.125, implementation=served
        )
        assert torch.equal(attention.out, out)
        assert torch.equal(attention.lse, lse)


@pytest.mark.parametrize("slot", [(5, 0), (-1, 0), (0, 16), (0, -1)])
def test_a_slot_outside_the_pool_is_refused_before_anything_is_written(slot: tuple[int, int]) -> None:
    arguments = build(DECODE, torch.float32)
    attention = prepare(arguments)
    k_pool, v_pool = arguments["k_pool"], arguments["v_pool"]
    blocks, heads, tokens, d = k_pool.shape
    block, offset = slot
    at = torch.tensor([blocks if block == 5 else block]), torch.tensor([tokens if offset == 16 else offset])
    layers = PreparedLayers(attention, [k_pool], [v_pool], *at)
    if layers.native is None:
        pytest.skip("no C++ core")
    before = k_pool.clone()
    fresh = torch.ones(1, heads, d)
    with pytest.raises(ValueError, match="slots"):
        layers(0, arguments["q"], fresh, fresh, 1.0)
    with pytest.raises(ValueError, match="layer"):
        layers(1, arguments["q"], fresh, fresh, 1.0)
    with pytest.raises(ValueError, match="k, v"):
        layers(0, arguments["q"], fresh[:, :1], fresh, 1.0)
    assert torch.equal(k_pool.nan_to_num(), before.nan_to_num())
