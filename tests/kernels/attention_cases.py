"""Cases of the MicroAttention contract and the one check that every implementation passes (CPU, interpreter, GPU)."""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass
from typing import Any

import torch

from distkv_dask.kernels import micro_attention

MAP_NORESERVE = 0x4000  # Linux; in the mmap module from Python 3.13 on
TOLERANCE = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 6e-3}


@dataclass(frozen=True)
class Case:
    """A ragged batch: ``lengths`` visible tokens and ``queries`` per row (None: decode, one per row)."""

    name: str
    lengths: tuple[int, ...]
    queries: tuple[int, ...] | None = None
    causal: bool = False
    starts: tuple[int, ...] | None = None
    kv_heads: int = 2
    group: int = 2
    d: int = 64
    block_tokens: int = 16
    logits: float = 1.0
    int8: bool = False
    first_keys: tuple[int, ...] | None = None
    soft_cap: float | None = None
    dv: int | None = None
    values_in_keys: bool = False

    @property
    def counts(self) -> tuple[int, ...]:
        """Queries of each row."""
        return (1,) * len(self.lengths) if self.queries is None else self.queries

    def window(self, row: int) -> int:
        """First token of a row that any of its queries sees."""
        length, count, before = self.lengths[row], self.counts[row], sum(self.counts[:row])
        if self.first_keys is None:
            return 0
        ends = [length if self.starts is None else min(length, self.starts[row] + i + 1) for i in range(count)]
        firsts = [max(0, first) for first in self.first_keys[before:][:count]]
        return min((first for first, end in zip(firsts, ends, strict=True) if first < end), default=length)

    def __str__(self) -> str:
        return self.name


CASES = [
    Case("decode-one-token", (1,)),
    Case("decode-nothing-visible", (0, 0)),
    Case("decode-ragged-with-an-empty-row", (5, 0, 33, 100)),
    Case("decode-block-edges", (15, 16, 17, 31, 32, 33, 64)),
    Case("decode-long-split-over-threads", (700,), group=3, kv_heads=3),
    Case("decode-no-groups", (40, 7), group=1),
    Case("decode-wide-group", (70,), kv_heads=1, group=12),
    Case("decode-head-dim-80", (50, 3), d=80),
    Case("decode-head-dim-96", (50, 3), d=96),
    Case("decode-head-dim-128", (50, 130), d=128, group=4),
    Case("decode-head-dim-256", (50,), d=256, kv_heads=1),
    Case("decode-head-dim-8", (50,), d=8),
    Case("decode-blocks-of-64", (200, 63), block_tokens=64),
    Case("decode-blocks-of-1", (9, 2), block_tokens=1),
    Case("decode-logits-1e4", (90,), logits=1e4),
    Case("decode-highest-score-grows-over-chunks", (500,), logits=8.0),
    Case("decode-causal-one-per-row", (20, 30), causal=True, starts=(19, 10)),
    Case("decode-int8", (75, 18), int8=True),
    Case("prefill-causal-own-chunk", (48,), (48,), causal=True, starts=(0,)),
    Case("prefill-causal-after-earlier-tokens", (90, 40), (20, 7), causal=True, starts=(70, 33)),
    Case("prefill-full-over-an-earlier-span", (77, 0), (33, 5)),
    Case("prefill-rows-without-queries", (30, 12, 9), (4, 0, 3)),
    Case("prefill-first-queries-see-nothing", (30,), (40,), causal=True, starts=(-10,)),
    Case("prefill-start-past-the-end", (30,), (6,), causal=True, starts=(500,)),
    Case("prefill-head-dim-80", (70,), (37,), causal=True, starts=(33,), d=80, group=3),
    Case("prefill-head-dim-128", (130,), (70,), causal=True, starts=(60,), d=128, block_tokens=64),
    Case("prefill-head-dim-256", (40,), (18,), d=256, kv_heads=1),
    Case("prefill-head-dim-8", (40,), (18,), d=8),
    Case("prefill-head-dim-24", (290,), (100,), causal=True, starts=(190,), d=24, group=1),
    Case("prefill-head-dim-104", (150,), (80,), causal=True, starts=(70,), d=104),
    Case("prefill-head-dim-192-over-chunks", (200,), (24,), causal=True, starts=(176,), d=192, group=3, kv_heads=1),
    Case("prefill-logits-1e4", (90,), (30,), causal=True, starts=(60,), logits=1e4),
    Case("prefill-logits-1e4-head-dim-80", (9,), (9,), causal=True, starts=(0,), logits=1e4, d=80),
    Case("prefill-highest-score-grows-over-chunks", (500,), (40,), causal=True, starts=(460,), logits=8.0),
    Case("prefill-int8", (75,), (30,), causal=True, starts=(45,), int8=True),
    Case("shared-prefix-of-16-questions", (333, 20), (16, 2), group=3),
    Case("shared-prefix-of-16-questions-in-groups-of-4", (300,), (16,), group=4, d=128),
    Case("shared-prefix-of-10-questions-in-groups-of-5", (150,), (10,), group=5),
    Case("decode-window-within-a-block", (100, 33, 5), first_keys=(60, 0, 3)),
    Case("decode-window-at-block-edges", (64, 64, 64, 63), first_keys=(15, 16, 17, 48)),
    Case("decode-window-hides-all-or-nothing", (20, 0, 30, 30, 7), first_keys=(20, 5, 31, -4, 2**31 - 1)),
    Case("decode-window-cut-into-pieces", (2500,), first_keys=(1301,), group=3),
    Case("decode-window-int8", (75, 18), int8=True, first_keys=(41, 3)),
    Case("decode-window-causal-one-per-row", (20, 30), causal=True, starts=(14, 25), first_keys=(3, 25)),
    Case("few-queries-of-a-row-with-windows", (90, 50), (3, 2), first_keys=(70, 12, 90, 33, 49)),
    Case(
        "prefill-sliding-window",
        (300, 40),
        (90, 20),
        True,
        (210, 20),
        first_keys=(*range(174, 264), *range(11, 31)),
        group=3,
    ),
    Case(
        "prefill-chunked-window",
        (300,),
        (150,),
        True,
        (150,),
        first_keys=tuple(at // 64 * 64 for at in range(150, 300)),
    ),
    Case(
        "prefill-window-hides-first-and-last-queries",
        (100,),
        (60,),
        True,
        (-10,),
        first_keys=(*range(-20, 30), *[100] * 10),
        d=80,
    ),
    Case(
        "prefill-window-of-a-past-shard",
        (200,),
        (40,),
        True,
        (190,),
        first_keys=tuple(range(180, 220)),
        block_tokens=64,
    ),
    Case("prefill-window-int8", (75,), (30,), True, (45,), int8=True, first_keys=tuple(range(20, 50))),
    Case(
        "shared-prefix-of-16-questions-with-windows",
        (333, 20),
        (16, 2),
        group=4,
        first_keys=(*range(0, 320, 20), 5, 20),
    ),
    Case("decode-soft-cap-30", (90, 5), soft_cap=30.0, logits=4.0),
    Case("decode-soft-cap-half", (500,), soft_cap=0.5, group=3),
    Case("decode-soft-cap-1e4", (90,), soft_cap=1e4),
    Case("decode-soft-cap-int8", (75, 18), int8=True, soft_cap=2.0),
    Case("decode-soft-cap-of-large-logits", (90,), soft_cap=20.0, logits=1e4),
    Case(
        "prefill-soft-cap-50-with-a-window", (90,), (30,), True, (60,), soft_cap=50.0, first_keys=tuple(range(40, 70))
    ),
    Case("prefill-soft-cap-5-head-dim-256", (150,), (40,), True, (110,), soft_cap=5.0, logits=8.0, d=256, kv_heads=1),
    Case("decode-short-values", (90, 5), dv=40),
    Case("decode-short-values-int8", (90, 5), dv=32, int8=True),
    Case("decode-short-values-in-keys", (90, 5), d=80, dv=64, values_in_keys=True),
    Case("decode-whole-values-in-keys", (90, 5), dv=64, values_in_keys=True),
    Case("prefill-short-values", (150,), (40,), True, (110,), d=192, dv=128, group=1),
    Case("prefill-short-values-int8-in-keys", (75,), (30,), True, (45,), int8=True, dv=32, values_in_keys=True),
    Case("latent-decode", (700, 33), d=576, dv=512, kv_heads=1, group=16, block_tokens=64, values_in_keys=True),
    Case(
        "latent-prefill-with-a-window",
        (90,),
        (7,),
        True,
        (83,),
        d=576,
        dv=512,
        kv_heads=1,
        group=16,
        values_in_keys=True,
        first_keys=tuple(range(50, 57)),
        soft_cap=30.0,
    ),
]


def named(name: str) -> Case:
    """The case with this name."""
    return next(case for case in CASES if case.name == name)


def build(case: Case, dtype: torch.dtype, seed: int = 0, device: str = "cpu") -> dict[str, Any]:
    """Tensors of a case as keyword arguments of micro_attention; unused blocks and tails hold NaN, as a trap."""
    rng = torch.Generator().manual_seed(seed)
    rows, bt, d = len(case.lengths), case.block_tokens, case.d
    per_row = [-(-n // bt) for n in case.lengths]
    blocks = sum(per_row) + 3
    order = torch.randperm(blocks, generator=rng)
    # As in the worker's pool, the layers of a block are contiguous, so a layer's view strides over the other layers.
    storage = torch.randn(blocks, 2, 2, case.kv_heads, bt, d, generator=rng)
    tables = torch.full((rows, max(per_row, default=0) + 1), -7, dtype=torch.int32)
    used = torch.zeros(blocks, bt, dtype=torch.bool)
    for row, count in enumerate(per_row):
        ids = order[sum(per_row[:row]) :][:count]
        tables[row, :count] = ids.int()
        token = torch.arange(count)[:, None] * bt + torch.arange(bt)
        used[ids] = (token < case.lengths[row]) & (token >= case.window(row))
    arguments: dict[str, Any] = {"scale": d**-0.5, "causal": case.causal, "soft_cap": case.soft_cap}
    if case.int8:
        arguments["k_scales"], arguments["v_scales"] = torch.rand(2, blocks, case.kv_heads, generator=rng) / 50
        storage = (storage * 40).clamp(-127, 127).to(torch.int8)
    else:
        storage = storage.masked_fill(~used[:, None, None, None, :, None], torch.nan).to(dtype)
    counts = case.counts
    if case.queries is not None:
        arguments["query_offsets"] = torch.tensor([0, *counts]).cumsum(0).int()
    if case.starts is not None:
        arguments["q_start"] = torch.tensor(case.starts, dtype=torch.int32)
    if case.first_keys is not None:
        arguments["first_keys"] = torch.tensor(case.first_keys, dtype=torch.int32)
    keys, values = storage[:, 1, 0], storage[:, 1, 1]
    if case.values_in_keys:
        values = keys[..., : case.dv]
    elif case.dv is not None:
        values = values[..., : case.dv].contiguous()
    q = torch.randn(sum(counts), case.kv_heads * case.group, d, generator=rng) * case.logits
    arguments |= {
        "q": q.to(dtype),
        "k_pool": keys,
        "v_pool": values,
        "block_tables": tables,
        "lengths": torch.tensor(case.lengths, dtype=torch.int32),
    }
    return {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}


def check(implementation: str, case: Case, dtype: torch.dtype, device: str = "cpu", **options: Any) -> None:
    """Compare an implementation with the float64 reference on the same (rounded) input."""
    arguments = build(case, dtype, device=device)
    out, lse = micro_attention(**arguments, **options, implementation=implementation)
    expected_out, expected_lse = micro_attention(**arguments, implementation="reference")
    assert out.dtype == lse.dtype == torch.float32
    assert out.shape == (*arguments["q"].shape[:2], arguments["v_pool"].shape[3])
    assert lse.shape == out.shape[:2]
    blind = expected_lse == -torch.inf
    assert torch.equal(lse == -torch.inf, blind)
    assert not out[blind].any()
    seen_out, seen_lse = expected_out[~blind], expected_lse[~blind]
    # fp32 rounding of a score grows with the score, and exp turns it into a relative error of a weight.
    # With logits of 8, few keys share the weight: every implementation, also torch's, is then off by up to 2.5e-6 in
    # fp32. With d = 576, a score is a sum of 576 rounded products.
    tolerance = TOLERANCE[dtype] * max(min(case.logits, 4.0), case.logits / 50, case.d / 256)
    scale = max(1.0, float(seen_out.abs().max())) if seen_out.numel() else 1.0
    torch.testing.assert_close(out[~blind], seen_out, rtol=0, atol=tolerance * scale)
    torch.testing.assert_close(lse[~blind], seen_lse, rtol=2e-6, atol=max(TOLERANCE[dtype], 5e-7 * case.logits))


def check_far_blocks(implementation: str) -> None:
    """A pool whose blocks are more than 2**31 elements apart; its memory is reserved, not used."""
    heads, block_tokens, d, stride = 2, 16, 64, (1 << 31) + 4096
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    memory = torch.frombuffer(mmap.mmap(-1, 2 * (2 * stride + 8192), flags=flags), dtype=torch.float16)
    form = (3, heads, block_tokens, d), (stride, block_tokens * d, d, 1)
    k_pool, v_pool = (memory.as_strided(*form, at) for at in (0, heads * block_tokens * d))
    for pool in (k_pool, v_pool):
        pool[1].normal_(), pool[2].normal_()
    arguments = {
        "q": torch.randn(2, 4, d).half(), "k_pool": k_pool, "v_pool": v_pool, "scale": 0.125,
        "block_tables": torch.tensor([[2, 1], [1, 2]], dtype=torch.int32),
        "lengths": torch.tensor([30, 17], dtype=torch.int32),
    }  # fmt: skip
    out, lse = micro_attention(**arguments, implementation=implementation)
    expected_out, expected_lse = micro_attention(**arguments, implementation="reference")
    torch.testing.assert_close(out, expected_out, rtol=0, atol=TOLERANCE[torch.float16])
    torch.testing.assert_close(lse, expected_lse, rtol=0, atol=TOLERANCE[torch.float16])


def use_interpreter() -> None:
    """Make Triton run kernels in its interpreter; Triton must not have been imported yet."""
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)
