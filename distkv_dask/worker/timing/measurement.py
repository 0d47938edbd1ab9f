"""Short timings of this worker for the performance model (paper v2).

The code that serves requests is timed: decode windows and prompt chunks of artificial sequences on the home lane and,
for the exchange, a gang with this worker's own holder lane as holder. KV contents do not matter. The engine is not open
yet, so the pool and both lanes are free.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import count
from typing import TYPE_CHECKING

import numpy as np
import torch

from distkv_dask.errors import DistKVError
from distkv_dask.gang import DecodeWindow, Gang, PrefillChunk, SequenceState
from distkv_dask.geometry import Geometry, Measurement
from distkv_dask.placement import Endpoint, Placement, Span
from distkv_dask.sampling import SamplingParams
from distkv_dask.worker.blocks.pool import Pool
from distkv_dask.worker.channels.bodies import Row
from distkv_dask.worker.device import Use
from distkv_dask.worker.lanes import Lanes
from distkv_dask.worker.runtime import Runtime
from distkv_dask.worker.shard import Shard

if TYPE_CHECKING:
    from distkv_dask.worker.model.recurrent import State

logger = logging.getLogger("distributed.distkv.measuring")

FORM = 4
"""Version of the measurement: results of older versions are not read."""
BATCH = 8
"""Sequences of the larger batch."""
LONGEST = 4096
"""Tokens of KV of the longer contexts, all sequences together."""
CASE_SECONDS = 0.15
"""Time for one case, but at least ``REPEATS`` steps."""
REPEATS = 3
CHUNKS = (32, 64, 128, 256)
"""Tokens of prompt chunks: the largest that is expected to take ``CHUNK_SECONDS`` is timed."""
CHUNK_SECONDS = 0.5
"""Short chunks would be misleading: with 64 tokens, SmolLM2-135M needs 1.7 times as long per token as with 512."""
_GREEDY = SamplingParams(max_new_tokens=1 << 30, ignore_eos=True)
_FIRST_GANG = 1 << 60
"""Far above the gManager's numbers of gangs."""


def measure(engine: str, geometry: Geometry, runtime: Runtime, lanes: Lanes, *, has_model: bool) -> Measurement | None:
    """Time this worker; None if its pool is too small, or after an error (which is logged).

    Not to be called on a lane; it takes about a second.
    """
    pool = runtime.pool
    if pool.capacity_blocks < 4 * BATCH:
        return None
    try:
        attention = tuple(lanes.home.submit(_attention, pool, geometry.heads).result())
        if not has_model:
            return Measurement(attention=attention)
        return replace(_Timing(engine, geometry, runtime, lanes).run(), attention=attention)
    except (DistKVError, torch.OutOfMemoryError):
        logger.exception("this worker could not be timed; a preset is used for its speed")
        return None
    finally:
        if runtime.tracer is not None:
            runtime.tracer.take_spans()  # a trace shows only work for requests


def _attention(pool: Pool, heads: int) -> list[tuple[int, float]]:
    """One query's attention in all layers over few and over many tokens."""
    device = pool.device
    found = []
    for tokens in (pool.block_tokens, _most(pool)):
        with _reserved(pool, 0, tokens), torch.inference_mode(), device.stream(Use.HOLDER):
            q = torch.zeros(1, heads, pool.head_dim, dtype=pool.dtype, device=device.torch)
            keys = torch.zeros(0, pool.kv_heads, pool.head_dim, dtype=pool.dtype, device=device.torch)
            values = keys[..., : pool.value_dim]
            shard = Shard(pool, [Row(0, tokens, 1, False, ((0, tokens),), (tokens,))], heads)
            seconds: list[float] = []
            while len(seconds) < REPEATS + 1 or sum(seconds) < CASE_SECONDS:
                began = time.perf_counter()
                for layer in range(pool.layers):
                    shard.attend(layer, q, keys, values, 1.0)
                device.finish()
                seconds.append(time.perf_counter() - began)
            found.append((tokens, statistics.median(seconds[1:])))
    return found


def _most(pool: Pool) -> int:
    """Tokens of a long context, whole blocks for each of a batch with room left for new tokens."""
    blocks = min(LONGEST // pool.block_tokens, pool.capacity_blocks - 2 * BATCH)
    return max(1, blocks // BATCH) * BATCH * pool.block_tokens


@contextmanager
def _reserved(pool: Pool, sequence: int, tokens: int) -> Iterator[None]:
    """Blocks that have been written to: reading untouched memory would be too fast."""
    pool.reserve(sequence, 0, tokens)
    zeros = np.zeros(pool.block_bytes, np.uint8)
    for block in pool.table(sequence):
        pool.fill(block, zeros)
    try:
        yield
    finally:
        pool.release_sequence(sequence)


class _Timing:
    """Timings of a worker with a model."""

    def __init__(self, engine: str, geometry: Geometry, runtime: Runtime, lanes: Lanes) -> None:
        self._engine = engine
        self._runtime = runtime
        self._lanes = lanes
        self._pool = runtime.pool
        self._numbers = count(_FIRST_GANG)
        self._state = self._state_after_a_token() if geometry.state_bytes else None
        windows = runtime.home_state.windows
        self._batch = BATCH if windows is None else min(BATCH, windows.sequences)
        longest = CHUNKS[-1] if windows is None else windows.chunk_tokens
        self._chunks = [size for size in CHUNKS if size <= longest] or [longest]
        limit = geometry.max_positions or LONGEST
        self._most = min(_most(self._pool), limit // 2 // self._pool.block_tokens * self._pool.block_tokens)

    def run(self) -> Measurement:
        size = self._pool.block_tokens
        small, large = size, max(size, self._most // BATCH // size * size)
        decode = [
            (batch, batch * tokens, self._decode(batch, tokens))
            for batch, tokens in (
                (1, small),
                (self._batch, small),
                (1, max(small + size, self._most)),
                (self._batch, large),
            )
        ]
        endpoint = self._lanes.endpoint
        own = replace(endpoint, worker=f"{endpoint.worker}#holder")
        exchange = None
        if not self._runtime.dialer.uses_ucx:  # a small difference of two large times, so they are measured in turns
            more = [self._decode(1, 2 * size, own) - self._decode(1, 2 * size) for _ in range(REPEATS)]
            exchange = max(0.0, statistics.median(more))
        return Measurement(tuple(decode), tuple(self._prompt()), exchange=exchange)

    def _decode(self, batch: int, tokens: int, holder: Endpoint | None = None) -> float:
        """Seconds of a decode step: the median of a few windows; a ``holder`` has the first half of each context."""
        home, pool = self._lanes.endpoint.worker, self._pool
        steps = min(8, pool.block_tokens)
        room = tokens + steps
        split: Placement = (Span(home, 0, room),)
        if holder is not None:
            split = (Span(holder.worker, 0, tokens // 2), Span(home, tokens // 2, room))
        states = [SequenceState(at, split, tokens, 1, 1 << 30, _GREEDY) for at in range(batch)]
        seconds: list[float] = []
        with ExitStack() as reserved:
            for state in states:
                reserved.enter_context(_reserved(pool, state.sequence, room))
                reserved.enter_context(self._with_state(state.sequence, tokens))
            while len(seconds) < REPEATS + 1 or sum(seconds) < CASE_SECONDS / steps:
                window = DecodeWindow(self._gang(home, holder), 0, steps, CASE_SECONDS / REPEATS)
                result = self._lanes.home.submit(self._runtime.decode, window, states).result()
                seconds.append(result.seconds / result.steps)
        return statistics.median(seconds[1:])

    def _prompt(self) -> Iterator[tuple[int, int, float]]:
        """A chunk at a prompt's start, and one after as many tokens as fit."""
        tokens = self._chunks[0]
        seconds = self._chunk(tokens, 0)
        for tokens in self._chunks[1:]:
            if 2 * seconds > CHUNK_SECONDS or 2 * tokens > self._most:
                tokens //= 2
                break
            seconds = self._chunk(tokens, 0)
        yield tokens, 0, self._chunk(tokens, 0)
        before = max(0, self._most - tokens) // self._pool.block_tokens * self._pool.block_tokens
        if before > 0:
            yield tokens, before, self._chunk(tokens, before)

    def _chunk(self, tokens: int, before: int) -> float:
        home = self._lanes.endpoint.worker
        placement = (Span(home, 0, before + tokens),)
        with _reserved(self._pool, 0, before + tokens), self._with_state(0, before):
            chunk = PrefillChunk(self._gang(home, None), 0, placement, before, (1,) * tokens)
            began = time.perf_counter()
            self._lanes.home.submit(self._runtime.prefill, chunk).result()
            return time.perf_counter() - began

    @contextmanager
    def _with_state(self, sequence: int, length: int) -> Iterator[None]:
        """An arbitrary state after this many tokens, if the model has recurrent layers, and windows."""
        kept = self._runtime.home_state
        kept.put(sequence, length, self._state)
        try:
            yield
        finally:
            kept.drop(sequence)

    def _state_after_a_token(self) -> State:
        home = self._lanes.endpoint.worker
        with _reserved(self._pool, 0, 1):
            chunk = PrefillChunk(self._gang(home, None), 0, (Span(home, 0, 1),), 0, (1,))
            self._lanes.home.submit(self._runtime.prefill, chunk).result()
        state = self._runtime.home_state.states.begin_run(0, 1)
        self._runtime.release_sequence(0)
        return state

    def _gang(self, home: str, holder: Endpoint | None) -> Gang:
        number = next(self._numbers)
        gang = Gang(self._engine, number, f"measure-{number}", 0, home, () if holder is None else (holder,))
        if holder is not None:
            self._runtime.open_session(gang)
        return gang
