"""Roofs of a card, and how close the kernels come to them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from distkv_dask.kernels import PreparedAttention, PreparedLayers, micro_attention

KV_HEADS, GROUP, D, BLOCK = 8, 4, 128, 64
"""Sizes of attention in Llama-3-8B and Qwen3-8B, and tokens of a block."""


class Card:
    """A card and its roofs; ``small`` shrinks everything for an emulated one."""

    def __init__(self, small: bool) -> None:
        self.small = small
        self.read = self.matrix = 1.0

    def timed(self, call: Callable[[], object], repeats: int = 15) -> float:
        """Median seconds of a call on the card, with a cold cache before each."""
        repeats, warm = (1, 0) if self.small else (repeats, 3)
        flush = torch.empty(1 if self.small else 64 << 20, dtype=torch.uint8, device="cuda")
        for _ in range(warm):
            call()
        found = []
        for _ in range(repeats):
            flush.zero_()
            before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            before.record()
            call()
            after.record()
            after.synchronize()
            found.append(max(before.elapsed_time(after), 1e-3) / 1e3)
        return statistics.median(found)

    def roofs(self, figures: dict[str, Any]) -> None:
        """Measure its read bandwidth and matrix-product rate."""
        properties = torch.cuda.get_device_properties(0)
        figures |= {"card": properties.name, "processors": properties.multi_processor_count}
        figures |= {"bytes": properties.total_memory, "torch": torch.__version__, "cuda": str(torch.version.cuda)}
        size, edge = (1 << 12, 64) if self.small else (1 << 31, 8192)
        data = torch.zeros(size // 2, dtype=torch.bfloat16, device="cuda")
        copy, square = torch.empty_like(data), torch.zeros(edge, edge, dtype=torch.bfloat16, device="cuda")
        copying = 2 * size / self.timed(lambda: copy.copy_(data), 5)
        self.read = max(copying, size / self.timed(data.sum, 5))
        self.matrix = 2 * edge**3 / self.timed(lambda: square @ square, 5)
        figures |= {"read_gb_per_s": round(self.read / 1e9), "bf16_tflops": round(self.matrix / 1e12)}

    def batch(self, lengths: list[int], queries: list[int] | None = None) -> dict[str, Any]:
        """Arguments of micro_attention for rows of these lengths; blocks lie anywhere."""
        counts = [-(-length // BLOCK) for length in lengths]
        storage = torch.zeros(sum(counts), 2, KV_HEADS, BLOCK, D, dtype=torch.bfloat16, device="cuda")
        tables = torch.zeros(len(lengths), max(counts), dtype=torch.int32)
        for row, ids in enumerate(torch.randperm(sum(counts)).int().split(counts)):
            tables[row, : counts[row]] = ids
        tokens = sum(queries) if queries else len(lengths)
        some: dict[str, Any] = {
            "q": torch.zeros(tokens, KV_HEADS * GROUP, D, dtype=torch.bfloat16, device="cuda"),
            "k_pool": storage[:, 0],
            "v_pool": storage[:, 1],
            "block_tables": tables,
            "lengths": torch.tensor(lengths, dtype=torch.int32),
        }
        if queries:
            some["query_offsets"] = torch.tensor([0, *queries]).cumsum(0).int()
        return some

    def prepared(self, some: dict[str, Any], **more: Any) -> Callable[[], None]:
        """A call as the engine makes it in each layer."""
        q, k, v = some["q"], some["k_pool"], some["v_pool"]
        index = {name: some[name] for name in ("block_tables", "lengths")}
        attention = PreparedAttention(
            len(q), q.shape[1], k, v, *index.values(), query_offsets=some.get("query_offsets"), **more
        )
        return lambda: attention(q, k, v, D**-0.5)

    def decode(self, figures: dict[str, Any]) -> bool:
        """Decode attention against the read roof, by context and batch."""
        shapes = {"1x8K": [8192], "1x64K": [65536], "1x128K": [131072], "8x16K": [16384] * 8, "64x2K": [2048] * 64}
        shapes["1x128K+63x1K"] = [131072] + [1024] * 63
        if self.small:
            shapes = {"1x64K": [128], "1x192+2x16": [192, 16, 16]}
        for name, lengths in shapes.items():
            seconds = self.timed(self.prepared(self.batch(lengths)))
            rate = sum(lengths) * 2 * KV_HEADS * D * 2 / seconds
            figures[name] = {
                "us": round(seconds * 1e6, 1),
                "gb_per_s": round(rate / 1e9),
                "roof": round(rate / self.read, 3),
            }
        return self.small or figures["1x64K"]["roof"] >= 0.8

    def prefill(self, figures: dict[str, Any]) -> bool:
        """Prefill attention against the matrix rate."""
        cases = {"2048 after 0": (2048, 0), "2048 after 30K": (2048, 30720), "512 after 30K": (512, 30720)}
        if self.small:
            cases = {"2048 after 30K": (64, 64)}
        for name, (count, before) in cases.items():
            start = torch.tensor([before], dtype=torch.int32)
            call = self.prepared(self.batch([before + count], [count]), causal=True, q_start=start)
            flop = 4 * KV_HEADS * GROUP * D * (count * before + count * (count + 1) / 2)
            rate = flop / self.timed(call, 5)
            figures[name] = {"tflops": round(rate / 1e12), "roof": round(rate / self.matrix, 3)}
        return self.small or figures["2048 after 30K"]["roof"] >= 0.6

    def layer(self, figures: dict[str, Any]) -> None:
        """Host time of a layer's append and attention, as the engine calls them."""
        rows = 2 if self.small else 8
        some = self.batch([64 if self.small else 4096] * rows)
        k, v = some["k_pool"], some["v_pool"]
        with torch.inference_mode():
            attention = PreparedAttention(rows, KV_HEADS * GROUP, k, v, some["block_tables"], some["lengths"])
            layers = PreparedLayers([attention], [0], [k], [v], *torch.zeros(2, rows, dtype=torch.int64))
            fresh = torch.zeros(rows, KV_HEADS, D, dtype=torch.bfloat16, device="cuda")
            many = 2 if self.small else 100
            layers(0, some["q"], fresh, fresh, 1.0)
            torch.cuda.synchronize()
            began = time.perf_counter()
            for _ in range(many):
                layers(0, some["q"], fresh, fresh, 1.0)
            queued = time.perf_counter() - began
            torch.cuda.synchronize()
        figures["host_us"] = round(queued / many * 1e6, 1)
        figures["host_and_card_us"] = round((time.perf_counter() - began) / many * 1e6, 1)

    def correct(self, figures: dict[str, Any]) -> bool:
        """The kernels against float64 softmax, for odd lengths, ragged queries and causal rows."""
        found = []
        for lengths, queries in (([1], [1]), ([63, 64, 65], [1, 1, 1]), ([200, 7], [5, 3])):
            some = self.batch(lengths, queries)
            for name in ("q", "k_pool", "v_pool"):
                some[name].copy_(torch.randn(some[name].shape))
            there = {name: one.to("cuda") for name, one in some.items()}
            start = torch.tensor(lengths) - torch.tensor(queries)
            out, lse = micro_attention(**there, scale=D**-0.5, causal=True, q_start=start.int().to("cuda"))
            host = {name: one.cpu() for name, one in some.items()}
            right = micro_attention(**host, scale=D**-0.5, causal=True, q_start=start.int(), implementation="reference")
            found += [float((a.cpu() - b).abs().max()) for a, b in zip((out, lse), right, strict=True)]
        figures["differences"] = found
        return all(one < 0.03 for one in found)  # NaN is not
