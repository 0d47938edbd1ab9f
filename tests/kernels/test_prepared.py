"""Prepared calls give the results of checked ones, layer by layer, and refuse tensors unlike the prepared ones."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from attention_cases import CASES, Case, build, named

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
        k = torch.empty_strided(k.shape, arguments["k_pool"].stride()).copy_(k)
        if case.values_in_keys:
            v = k[..., : case.dv]
        attention(q, k, v, scale)
        of = {"q": q, "k_pool": k, "v_pool": v, "scale": scale}
        out, lse = micro_attention(**arguments | of, implementation=served)
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
    layers = PreparedLayers([attention], [0, 0], k_layers, v_layers, blocks, offsets)
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
    layers = PreparedLayers([attention], [0], [k_pool], [v_pool], *at)
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


def test_windows_may_move_between_calls(served: str) -> None:
    arguments = build(named("decode-window-within-a-block"), torch.float32)
    arguments["k_pool"], arguments["v_pool"] = (arguments[name].nan_to_num(0.5) for name in ("k_pool", "v_pool"))
    attention = prepare(arguments)
    found = []
    for move in (0, 3, 1000, -2000):
        arguments["first_keys"] += move
        attention.refresh()
        attention(arguments["q"], arguments["k_pool"], arguments["v_pool"], 0.1)
        out, lse = micro_attention(**arguments | {"scale": 0.1}, implementation=served)
        assert torch.equal(attention.out, out)
        assert torch.equal(attention.lse, lse)
        found.append(out)
    assert not found[2].any()
    assert not torch.equal(found[0], found[1])


class Kind(NamedTuple):
    """Differences between layers: window, soft cap, kv heads and sizes of the layer's pool."""

    first_keys: list[int] | None
    soft_cap: float | None
    kv_heads: int
    d: int
    dv: int
    values_in_keys: bool = False


KINDS = [
    Kind(None, None, 2, 64, 64),
    Kind([5, 2], None, 2, 64, 64),
    Kind([17, 0], 20.0, 1, 32, 16),
    Kind(None, 5.0, 1, 40, 32, True),
]


def pools_of(kind: Kind) -> tuple[torch.Tensor, torch.Tensor]:
    k = torch.randn(5, kind.kv_heads, 16, kind.d)
    return k, k[..., : kind.dv] if kind.values_in_keys else torch.randn(5, kind.kv_heads, 16, kind.dv)


def test_layers_of_several_kinds_append_and_attend_each_in_its_way(served: str) -> None:
    of_layer, heads = [1, 0, 2, 1, 3, 2], 4
    pools = [pools_of(KINDS[kind]) for kind in of_layer]
    tables, lengths = torch.tensor([[3, 1], [2, 0]], dtype=torch.int32), torch.tensor([18, 5], dtype=torch.int32)
    blocks, offsets = torch.tensor([1, 2]), torch.tensor([1, 4])
    memory = torch.empty(2 * heads * 65)
    windows = [None if kind.first_keys is None else torch.tensor(kind.first_keys, dtype=torch.int32) for kind in KINDS]
    attentions = [
        PreparedAttention(
            2, heads, *pools[of_layer.index(at)], tables, lengths, first_keys=windows[at], soft_cap=kind.soft_cap,
            result=memory[: 2 * heads * (kind.dv + 1)],
        )
        for at, kind in enumerate(KINDS)
    ]  # fmt: skip
    layers = PreparedLayers(attentions, of_layer, [k for k, _ in pools], [v for _, v in pools], blocks, offsets)
    assert (layers.native is not None) == (served == "native")
    assert attentions[0].out.data_ptr() == attentions[1].out.data_ptr()
    for layer, (at, (k_pool, v_pool)) in enumerate(zip(of_layer, pools, strict=True)):
        kind = KINDS[at]
        q, k, v = (
            torch.randn(2, n, d) for n, d in ((heads, kind.d), (kind.kv_heads, kind.d), (kind.kv_heads, kind.dv))
        )
        expected_k = k_pool.clone()
        expected_v = expected_k[..., : kind.dv] if kind.values_in_keys else v_pool.clone()
        for row in range(2):
            expected_v[blocks[row], :, offsets[row]] = v[row]
            expected_k[blocks[row], :, offsets[row]] = k[row]
        layers(layer, q, k, None if kind.values_in_keys else v, 0.125)
        assert torch.equal(k_pool, expected_k)
        assert torch.equal(v_pool, expected_v)
        out, lse = micro_attention(
            q, k_pool, v_pool, tables, lengths, scale=0.125, first_keys=windows[at], soft_cap=kind.soft_cap,
            implementation=served,
        )  # fmt: skip
        assert torch.equal(attentions[at].out, out)
        assert torch.equal(attentions[at].lse, lse)


def test_layers_without_an_attention_of_their_own_are_named() -> None:
    arguments = build(DECODE, torch.float32)
    attention, pools = prepare(arguments), ([arguments["k_pool"]] * 2, [arguments["v_pool"]] * 2)
    slots = torch.zeros(2, 0, dtype=torch.int64)
    for of_layer in ([0], [0, 1], [0, -1]):
        with pytest.raises(ValueError, match=r"^of_layer, k_layers, v_layers"):
            PreparedLayers([attention], of_layer, *pools, *slots)
    layers = PreparedLayers([attention], [0, 0], *pools, *slots)
    with pytest.raises(ValueError, match=r"^k, v: expected"):
        layers(0, arguments["q"], arguments["q"][:0, :2], None, 1.0)
