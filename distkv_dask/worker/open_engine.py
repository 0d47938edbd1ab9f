"""One engine on one worker: its runtime, the sequences that this worker decodes, and the tasks of its gangs.

Threads: messages arrive on the worker's event loop, tasks in threads of the worker, and compute happens on the home
lane. What they share is small and under one lock.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import psutil

from distkv_dask.errors import CapacityError, ConfigError, DistKVError, GangAbortedError
from distkv_dask.protocol import EngineSpec, FromWorker, Ready
from distkv_dask.types import (
    DecodeWindow,
    Endpoint,
    FinishReason,
    Gang,
    PrefillChunk,
    SequenceState,
    WindowResult,
)
from distkv_dask.worker.lanes import Lanes
from distkv_dask.worker.model import LoadedModel, load_model
from distkv_dask.worker.pool import Pool
from distkv_dask.worker.runtime import Runtime

if TYPE_CHECKING:
    from distributed import Worker

PAUSE_FRACTION = 0.8
"""Dask pauses a worker whose process is above this part of its memory limit (``distributed.worker.memory.pause``)."""

_REMEMBERED = 1024


class OpenEngine:
    """An engine that is open on this worker.

    Parameters
    ----------
    spec
        What the gManager asked for.
    worker
        This worker's address.
    model, runtime, lanes
        What computes.
    tell
        Sends an event to the gManager.
    """

    def __init__(
        self,
        spec: EngineSpec,
        worker: str,
        model: LoadedModel,
        runtime: Runtime,
        lanes: Lanes,
        tell: Callable[[FromWorker, str, Any], None],
    ) -> None:
        self.spec = spec
        self.worker = worker
        self.model = model
        self.runtime = runtime
        self.lanes = lanes
        self._tell = tell
        self._lock = threading.Lock()
        self._epoch = 0
        self._decoded_until = 0.0
        self._batch: dict[int, SequenceState] = {}
        self._holders: dict[int, tuple[Endpoint, ...]] = {}
        self._retired: set[int] = set()
        self._aborted: OrderedDict[int, tuple[str, bool]] = OrderedDict()

    def facts(self) -> Ready:
        """What the gManager has to know."""
        geometry, pool = self.model.geometry, self.runtime.pool
        return Ready(
            endpoint=self.lanes.endpoint,
            channels=self.runtime.dialer.explain(),
            capacity_blocks=pool.capacity_blocks,
            block_bytes=pool.storage[0].nbytes,
            max_positions=geometry.max_positions,
            vocab_size=geometry.vocab_size,
            dtype=geometry.dtype,
        )

    def close(self) -> None:
        """End everything and free the pool and the model; blocks until no thread uses them."""
        self.runtime.close()

    # Messages of the gManager

    def reserve(self, sequence: int, tokens: int) -> None:
        """Allocate blocks; the ledger made sure that they are free."""
        self.runtime.reserve(sequence, tokens)

    def release(self, sequence: int) -> None:
        """Free blocks that nobody computes on."""
        with self._lock:
            self._batch.pop(sequence, None)
            self._holders.pop(sequence, None)
            self._retired.discard(sequence)
        self.runtime.release(sequence)

    def retire(self, sequence: int) -> None:
        """Begin nothing new on a sequence, and tell the gManager when what is under way has ended."""
        with self._lock:
            self._retired.add(sequence)
            self._batch.pop(sequence, None)
        self.lanes.home.submit(self._fence_holder_lane, sequence)

    def _fence_holder_lane(self, sequence: int) -> None:
        """On the home lane, when all before it has ended: the same for the holder lane, then the answer."""
        told = partial(self._tell, FromWorker.RETIRED, self.spec.engine, sequence)
        self.lanes.holder.fence().add_done_callback(lambda _: told())

    def join(self, state: SequenceState, holders: tuple[Endpoint, ...]) -> None:
        """Decode a sequence from the next window on."""
        with self._lock:
            self._batch[state.sequence] = state
            self._holders[state.sequence] = holders

    def reset(self, epoch: int) -> None:
        """Forget all sequences; windows of an older epoch, running ones included, commit nothing."""
        with self._lock:
            self._epoch = epoch
            self._decoded_until = 0.0
            self._batch.clear()
            self._holders.clear()

    def abort(self, gang: int, reason: str, unused: bool) -> None:
        """End this worker's part in a gang, also when it has not begun."""
        with self._lock:
            self._aborted[gang] = (reason, unused)
            if len(self._aborted) > _REMEMBERED:
                self._aborted.popitem(last=False)
        self.runtime.abort(gang, reason)

    # Tasks of step graphs

    def prefill(self, chunk: PrefillChunk) -> int:
        """Compute a chunk on the home lane, and commit it."""
        try:
            self.lanes.home.submit(partial(self._prefill, chunk)).result()
        except Exception as error:
            self._fail(chunk.gang, error)
            raise
        return len(chunk.tokens)

    def _prefill(self, chunk: PrefillChunk) -> None:
        self._check(chunk.gang)
        if chunk.sequence in self._retired:
            raise GangAbortedError(f"sequence {chunk.sequence} ended before its chunk {chunk.gang.name} began")
        token = self.runtime.prefill(chunk)
        if chunk.sampling is None or token is None:
            self._tell(FromWorker.CHUNK_DONE, self.spec.engine, (chunk.sequence, chunk.gang.number))
            return
        reason: FinishReason | None = None
        if token in self.model.eos_token_ids and not chunk.sampling.ignore_eos:
            reason = "stop"
        elif chunk.sampling.max_new_tokens == 1:
            reason = "length"
        self._tell(FromWorker.PREFILLED, self.spec.engine, (chunk.sequence, chunk.gang.number, token, reason))

    def decode(self, window: DecodeWindow) -> int:
        """Run a window on the home lane over the sequences that have joined when it begins, and commit it."""
        try:
            return self.lanes.home.submit(partial(self._decode, window)).result()
        except Exception as error:
            self._fail(window.gang, error)
            raise

    def _decode(self, window: DecodeWindow) -> int:
        self._check(window.gang)
        with self._lock:
            batch = list(self._batch.values())[: self.spec.config.window_batch] if self._current(window) else []
            holders = {one.worker: one for state in batch for one in self._holders[state.sequence]}
        self._tell(FromWorker.WINDOW_STARTED, self.spec.engine, window.window)
        used = tuple(holders.values())
        result = WindowResult({}, {}, 0, 0.0, 0.0)
        if batch:
            gap = time.perf_counter() - self._decoded_until if self._decoded_until else 0.0
            result = self.runtime.decode(replace(window, gang=replace(window.gang, holders=used)), batch)
            result = replace(result, gap=gap)
        with self._lock:
            if not self._current(window):
                raise GangAbortedError(f"window {window.gang.name} was superseded by a newer placement")
            for state in batch:
                self._advance(state, result)
            self._decoded_until = time.perf_counter() if self._batch else 0.0
        payload = (window.window, window.gang.epoch, result, tuple(holders))
        self._tell(FromWorker.WINDOW_DONE, self.spec.engine, payload)
        return result.steps

    def _current(self, window: DecodeWindow) -> bool:
        return window.gang.epoch == self._epoch

    def _advance(self, state: SequenceState, result: WindowResult) -> None:
        """Commit a window's tokens to one sequence of the batch, unless it left meanwhile."""
        tokens = result.tokens.get(state.sequence, [])
        if self._batch.get(state.sequence) is not state:
            return
        if state.sequence in result.finished:
            del self._batch[state.sequence]
            return
        self._batch[state.sequence] = replace(
            state,
            length=state.length + len(tokens),
            last_token=tokens[-1],
            remaining=state.remaining - len(tokens),
            history=(*state.history, *tokens) if state.history else (),
        )

    def attend(self, gang: Gang) -> dict[str, float]:
        """Serve one gang as a holder until its home says that it is over."""
        try:
            self._check(gang)
            stats = self.runtime.open_session(gang).wait()
        except Exception as error:
            with self._lock:
                unused = self._aborted.get(gang.number, ("", False))[1]
            if unused:
                return {"requests": 0}
            self._fail(gang, error)
            raise
        return {"requests": stats.requests, "bytes_in": stats.bytes_in, "bytes_out": stats.bytes_out}

    def _check(self, gang: Gang) -> None:
        with self._lock:
            if gang.number in self._aborted:
                raise GangAbortedError(f"gang {gang.name} was aborted: {self._aborted[gang.number][0]}")

    def _fail(self, gang: Gang, error: Exception) -> None:
        with self._lock:
            if gang.number in self._aborted:
                return
        if not isinstance(error, DistKVError):  # others' errors may not survive the journey to the client
            error = DistKVError(f"{type(error).__name__} on worker {self.worker} in {gang.name}: {error}")
        self._tell(FromWorker.GANG_FAILED, self.spec.engine, (gang.number, error))


def build_engine(
    spec: EngineSpec, lanes: Lanes, worker: Worker, tell: Callable[[FromWorker, str, Any], None]
) -> OpenEngine:
    """Load the model and allocate the pool of an engine on a worker; blocks for seconds.

    Raises
    ------
    ModelError, UnsupportedModelError
        The model cannot be loaded or served.
    CapacityError, ConfigError
        KV memory is too small for a block or does not fit the worker.
    """
    model = load_model(spec.model, spec.dtype, lanes.threads)
    one = model.geometry
    block_tokens = spec.config.block_tokens
    block_bytes = Pool.block_bytes(
        layers=one.layers, kv_heads=one.kv_heads, head_dim=one.head_dim, dtype=one.dtype, block_tokens=block_tokens
    )
    limit = worker.memory_manager.memory_limit
    kv_memory = spec.config.kv_memory
    if kv_memory is None:
        if not limit:
            raise ConfigError(
                f"worker {worker.address} has no memory limit to take half of: give kv_memory (distkv.kv-memory)"
            )
        kv_memory = limit // 2
    if kv_memory < block_bytes:
        raise CapacityError(
            f"kv_memory is {kv_memory} bytes, but one block of {block_tokens} tokens of this model needs "
            f"{block_bytes}: raise kv_memory (distkv.kv-memory) or lower distkv.block-tokens"
        )
    resident = psutil.Process().memory_info().rss
    if limit and resident + kv_memory > PAUSE_FRACTION * limit:
        raise CapacityError(
            f"kv_memory of {kv_memory} bytes does not fit worker {worker.address}: its process holds {resident} bytes "
            f"(model included), and Dask pauses it above {PAUSE_FRACTION:.0%} of its memory limit of {limit} bytes. "
            f"Lower kv_memory (distkv.kv-memory) or raise the worker's memory_limit."
        )
    pool = Pool(
        layers=one.layers,
        kv_heads=one.kv_heads,
        head_dim=one.head_dim,
        dtype=one.dtype,
        block_tokens=block_tokens,
        blocks=kv_memory // block_bytes,
    )
    runtime = Runtime(spec, model, pool, lanes)
    return OpenEngine(spec, worker.address, model, runtime, lanes, tell)
