"""The fastest of the core's instruction sets on this processor, measured for few queries and for many.

CPU flags do not show it: on one processor the bf16 dot product is the fastest, on another it runs at half the rate of
plain AVX-512.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from . import native_kernel
from .contract import Call
from .memory import advise_huge_pages

POOL_BYTES = 64 << 20
"""KV of the decode case: larger than the caches of most processors, as the KV of all layers is."""
BLOCK_TOKENS, KV_HEADS, GROUP, HEAD_DIM = 64, 4, 4, 128
PREFILL_QUERIES, PREFILL_TOKENS = 64, 1024
ROUND_SECONDS, ROUNDS = 0.08, 3
"""Time limit in seconds for the rounds of one kind of work, and their minimum number."""
CLEARLY = 1.05
"""A set is preferred to an earlier one in :func:`native_kernel.instruction_sets` if it is faster by this factor."""
REPEATED = 1.05
"""If the two best times of a set differ by more, something else used the processor."""
BEATEN = 1.5
"""After ``ROUNDS`` rounds, sets that are slower than the best by this factor are no longer timed."""

Times = Mapping[str, tuple[float, ...]]
"""The two best times of each candidate, such as an instruction set, in seconds, the best first."""


@dataclass(frozen=True, slots=True)
class SetTimes:
    """Times of each instruction set: ``few`` queries (decode) over KV in memory, and ``many`` (prefill).

    ``few_bytes`` are read and ``many_flop`` computed in these times.
    """

    few: Times
    many: Times
    few_bytes: int
    many_flop: int

    @property
    def settled(self) -> bool:
        """Whether each best time came twice: otherwise something else ran, and it is worth timing again."""
        return repeat(self.few, REPEATED) and repeat(self.many, REPEATED)

    def fastest(self) -> tuple[str, str]:
        """Instruction sets for few and for many queries."""
        return _fastest(self.few), _fastest(self.many)

    def __str__(self) -> str:
        read = ", ".join(f"{name} {self.few_bytes / min(best) / 1e9:.1f}" for name, best in self.few.items())
        computed = ", ".join(f"{name} {self.many_flop / min(best) / 1e9:.0f}" for name, best in self.many.items())
        return f"measured on one thread: decode {read} GB/s; prefill {computed} GFLOP/s"


def time_sets(dtype: torch.dtype, known: SetTimes | None = None) -> SetTimes:
    """Time every instruction set on one thread, in about 0.2 seconds.

    They take turns, so that other load affects all of them equally.

    Parameters
    ----------
    dtype
        Of the KV.
    known
        Earlier times of the same sets; the better ones are kept.
    """
    few, many = _few(dtype), _many(dtype)
    return SetTimes(
        _best(few, _candidates(dtype, many=False), known.few if known else {}),
        _best(many, _candidates(dtype, many=True), known.many if known else {}),
        2 * few.k_pool.numel() * few.k_pool.element_size(),
        4 * PREFILL_QUERIES * PREFILL_TOKENS * KV_HEADS * GROUP * HEAD_DIM,
    )


def _candidates(dtype: torch.dtype, *, many: bool) -> list[str]:
    names = native_kernel.instruction_sets(dtype, many=many)
    return [name for name in names if name != "portable"] or names


def _fastest(times: Times) -> str:
    names = iter(times)
    chosen = next(names)
    for name in names:
        if min(times[name]) * CLEARLY < min(times[chosen]):
            chosen = name
    return chosen


def repeat(times: Times, within: float) -> bool:
    """Whether the best time of each contender came twice, up to this factor."""
    return all(max(times[name]) <= within * min(times[name]) for name in contenders(times))


def contenders(times: Times) -> list[str]:
    """Those that are not slower than the best by the factor ``BEATEN``."""
    best = min(map(min, times.values()))
    return [name for name, ones in times.items() if min(ones) <= BEATEN * best]


def _best(call: Call, names: list[str], known: Times) -> Times:
    best = {name: tuple(sorted(known.get(name, (math.inf, math.inf)))) for name in names}
    rounds, until = 0, time.perf_counter() + ROUND_SECONDS
    while rounds < ROUNDS or time.perf_counter() < until:
        for name in names if rounds < ROUNDS else contenders(best):
            began = time.thread_time()  # does not count while another process has the core
            native_kernel.run_isa(call, name.encode())
            best[name] = tuple(sorted([*best[name], time.thread_time() - began])[:2])
        rounds += 1
    return best


def _few(dtype: torch.dtype) -> Call:
    block_bytes = 2 * KV_HEADS * BLOCK_TOKENS * HEAD_DIM * dtype.itemsize
    return _call(dtype, POOL_BYTES // block_bytes, 1)


def _many(dtype: torch.dtype) -> Call:
    return _call(dtype, PREFILL_TOKENS // BLOCK_TOKENS, PREFILL_QUERIES)


def _call(dtype: torch.dtype, blocks: int, queries: int) -> Call:
    """One row of ``queries`` queries over ``blocks`` blocks that have been written to."""
    pool = torch.empty(blocks, 2, KV_HEADS, BLOCK_TOKENS, HEAD_DIM, dtype=dtype)
    advise_huge_pages(pool)
    pool.fill_(1)
    scales = torch.ones(blocks, KV_HEADS) if dtype == torch.int8 else None
    q = torch.zeros(queries, KV_HEADS * GROUP, HEAD_DIM, dtype=torch.bfloat16 if dtype == torch.int8 else dtype)
    return Call(
        q, pool[:, 0], pool[:, 1], torch.arange(blocks, dtype=torch.int32)[None],
        torch.tensor([blocks * BLOCK_TOKENS], dtype=torch.int32), HEAD_DIM**-0.5,
        torch.tensor([0, queries], dtype=torch.int32), False, None, scales, scales, 1, None, None,
    )  # fmt: skip
