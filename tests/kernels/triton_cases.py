"""Checks of prepared calls by the Triton kernels, for Triton's interpreter and for real GPUs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from attention_cases import TOLERANCE, Case, build

from distkv_dask.kernels import (
    Choice,
    PreparedAttention,
    PreparedLayers,
    PreparedMerges,
    micro_attention,
    prepared,
    triton_batch,
    triton_kernel,
)

INDEX = ("block_tables", "lengths", "query_offsets", "q_start", "first_keys")
CUT = [
    Case("decode-cut-into-pieces", (3000, 5, 0, 700), block_tokens=64),
    Case("decode-cut-small-blocks", (900, 2100), block_tokens=16, group=3),
    Case("prefill-cut-into-pieces", (1500, 40), (9, 20), causal=True, starts=(1491, 20), group=3),
    Case("prefill-and-decode-cut", (1200, 2000, 600), (12, 1, 1), block_tokens=32),
    Case(
        "windows-cut-into-pieces",
        (3000, 1500, 900),
        (1, 12, 1),
        first_keys=(1001, *range(300, 360, 5), 0),
        soft_cap=20.0,
        block_tokens=32,
    ),
]


@contextmanager
def served_by_triton() -> Iterator[None]:
    """Let Triton serve prepared calls of host tensors, which its interpreter accepts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepared, "choose", lambda *_: Choice("triton", "for a test"))
        patch.setattr(triton_kernel, "unsupported", lambda *_: None)
        yield


def prepare(arguments: dict[str, Any], index: dict[str, Any]) -> PreparedAttention:
    fixed = {name: arguments[name] for name in ("k_pool", "v_pool", "causal", "soft_cap")}
    return PreparedAttention(*arguments["q"].shape[:2], **fixed, **index)


def check_prepared(case: Case, dtype: torch.dtype, device: str = "cpu") -> None:
    """Check that answers stay exact and addresses the same when index tensors on the host change from step to step."""
    arguments = build(case, dtype, device=device)
    index = {name: arguments[name].cpu() for name in INDEX if name in arguments}
    with served_by_triton():
        attention = prepare(arguments, index)
    full, found = index["lengths"].clone(), []
    for part in (1.0, 0.4, 0.0):
        index["lengths"].copy_((full * part).int())
        attention.refresh()
        attention(arguments["q"], arguments["k_pool"], arguments["v_pool"], arguments["scale"])
        there = {name: values.to(device) for name, values in index.items()}
        out, lse = micro_attention(**arguments | there, implementation="reference")
        seen = lse > -torch.inf
        assert torch.equal(attention.lse > -torch.inf, seen)
        assert not attention.out[~seen].any()
        torch.testing.assert_close(attention.out[seen], out[seen], rtol=0, atol=TOLERANCE[dtype])
        torch.testing.assert_close(attention.lse[seen], lse[seen], rtol=2e-6, atol=TOLERANCE[dtype])
        found.append(attention.out.clone())
    assert not torch.equal(found[0], found[1])


def check_layers(device: str = "cpu") -> None:
    """Check that one launch stores new KV, which the same layer's attention sees, in two steps of two layers."""
    pool, heads, d = torch.randn(5, 2, 2, 2, 16, 64, device=device), 4, 64
    k_layers, v_layers = [pool[:, at, 0] for at in range(2)], [pool[:, at, 1] for at in range(2)]
    tables, lengths = torch.tensor([[3, 1], [2, 0]], dtype=torch.int32), torch.tensor([18, 5], dtype=torch.int32)
    blocks, offsets = torch.tensor([1, 2]), torch.tensor([1, 4])
    with served_by_triton():
        attention = PreparedAttention(2, heads, k_layers[0], v_layers[0], tables, lengths)
        layers = PreparedLayers([attention], [0, 0], k_layers, v_layers, blocks, offsets)
    for _ in range(2):
        for layer in range(2):
            q, fresh = torch.randn(2, heads, d, device=device), torch.randn(2, 2, 2, d, device=device)
            expected = pool.clone()
            for row in range(2):
                expected[blocks[row], layer, :, :, offsets[row]] = fresh[:, row]
            layers(layer, q, *fresh, 0.125)
            assert torch.equal(pool, expected)
            views = expected[:, layer, 0], expected[:, layer, 1]
            there = tables.to(device), lengths.to(device)
            out, lse = micro_attention(q, *views, *there, scale=0.125, implementation="reference")
            torch.testing.assert_close(attention.out, out, rtol=0, atol=1e-5)
            torch.testing.assert_close(attention.lse, lse, rtol=0, atol=1e-5)
        lengths += 1
        offsets += 1
        layers.refresh()


def check_merges(device: str = "cpu") -> None:
    """Compare partials of three sources (some tokens with several, one without) with a float64 softmax over sources."""
    tokens, heads, d, queries = 5, 3, 80, (4, 5, 1)
    runs = [(1, 0, 0, 3), (0, 0, 0, 2), (0, 2, 2, 1), (2, 0, 0, 1), (0, 3, 4, 1), (1, 4, 4, 1)]
    out, lse = torch.full((tokens, heads, d), 7.0, device=device), torch.full((tokens, heads), 7.0, device=device)
    partials = torch.empty(sum(queries) * heads * (d + 1), device=device)
    with served_by_triton():
        merges = PreparedMerges(out, lse, partials, queries, runs)
    for _ in range(2):
        for part_out, part_lse in merges.sources:
            part_out.normal_()
            part_lse.normal_(std=5.0)
        merges.sources[1][0][1], merges.sources[1][1][1] = 0.0, -torch.inf
        merges()
        for token in range(tokens):
            at = [(source, query + token - first) for source, query, first, n in runs if first <= token < first + n]
            if not at:
                assert not out[token].any()
                assert (lse[token] == -torch.inf).all()
                continue
            found = torch.stack([merges.sources[source][0][query] for source, query in at]).double()
            scores = torch.stack([merges.sources[source][1][query] for source, query in at]).double()
            torch.testing.assert_close(lse[token].double(), scores.logsumexp(0), rtol=0, atol=1e-5)
            right = (scores.softmax(0)[..., None] * found).sum(0)
            torch.testing.assert_close(out[token].double(), right, rtol=0, atol=1e-5)


def variant(kwargs: dict[str, Any], args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Properties for which Triton's compiler makes a separate kernel."""

    def form(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return str(value.dtype), value.data_ptr() % 16 == 0
        if isinstance(value, int):
            return 1 if value == 1 else (value % 16 == 0, abs(value) >= 1 << 31)
        return type(value)

    return tuple(sorted(kwargs.items())), tuple(map(form, args))


def check_all_variants_are_warm(windows: bool = False, soft_cap: float | None = None) -> None:
    """Check that batches launch only kernels that were already launched when the engine opened."""
    from triton.runtime.interpreter import GridExecutor

    seen: set[tuple[Any, ...]] = set()
    with pytest.MonkeyPatch.context() as patch:

        def record(self: Any, *args: Any, **kwargs: Any) -> None:
            table_stride = [15] if self.fn.__name__ == "attend" else []
            args = tuple(3 if at in table_stride else value for at, value in enumerate(args))
            seen.add((self.fn.__name__, variant(kwargs, args)))

        patch.setattr(GridExecutor, "__call__", record)
        pool = torch.zeros(40, 2, 2, 2, 64, 128, dtype=torch.float16)
        triton_batch.warm_up(pool[:, 0, 0], pool[:, 0, 1], 8, windows=windows, soft_cap=soft_cap)
        warm = set(seen)
        names = [name for name, _ in warm]
        assert sorted(names) == ["append", "attend", "attend", "merge_partials"]
        for rows, queries in ((1, 1), (3, 1), (7, 1), (1, 300), (2, 5), (1, 3)):
            tables = torch.arange(rows * 5, dtype=torch.int32).view(rows, 5)
            lengths = torch.full((rows,), 310, dtype=torch.int32)
            offsets = torch.arange(rows + 1, dtype=torch.int32) * queries
            slots = torch.arange(rows), torch.zeros(rows, dtype=torch.int64)
            first_keys = torch.full((rows * queries,), 100, dtype=torch.int32) if windows else None
            with served_by_triton():
                for layer in range(2):
                    views = pool[:, layer, 0], pool[:, layer, 1]
                    attention = PreparedAttention(
                        rows * queries, 8, *views, tables, lengths, query_offsets=offsets, first_keys=first_keys,
                        soft_cap=soft_cap,
                    )  # fmt: skip
                    layers = PreparedLayers([attention], [0], *([view] for view in views), *slots)
                    fresh = torch.zeros(2, rows, 2, 128, dtype=pool.dtype)
                    layers(0, torch.zeros(rows * queries, 8, 128, dtype=pool.dtype), *fresh, 0.1)
        assert seen == warm, seen - warm
