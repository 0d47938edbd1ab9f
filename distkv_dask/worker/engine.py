"""One engine on one worker: the gManager's messages on its sequences, and the tasks of its gangs.

Threads: messages arrive on the worker's event loop, tasks run in threads of the worker, and computing happens on the
home lane. Their small shared state is protected by one lock.
"""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import CancelledError
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from distkv_dask.adapter import Adapter
from distkv_dask.errors import (
    CapacityError,
    DeviceLostError,
    DistKVError,
    EngineClosedError,
    GangAbortedError,
    in_words,
    portable,
)
from distkv_dask.gang import Attended, DecodeWindow, Gang, SequenceState, WindowResult
from distkv_dask.messages import from_worker as did
from distkv_dask.messages.names import Piece, Transfer
from distkv_dask.placement import Endpoint, Placement
from distkv_dask.sampling import SamplingParams
from distkv_dask.worker.blocks.files import BlockFiles
from distkv_dask.worker.blocks.transfer import Arrivals, send_blocks
from distkv_dask.worker.dask_metrics import computing, metered, metered_session
from distkv_dask.worker.decode_batch import DecodeBatch
from distkv_dask.worker.prefill_tasks import PrefillTasks
from distkv_dask.worker.runtime import Runtime

if TYPE_CHECKING:
    from distkv_dask.worker.model.loaded import LoadedModel

_REMEMBERED = 1024


class WorkerEngine:
    """An engine that is open on this worker.

    Parameters
    ----------
    runtime
        Computes the gangs.
    model
        The weights; None on a memory worker.
    files
        Saves and spills blocks.
    facts
        Facts for the gManager.
    tell
        Sends a message to the gManager.
    """

    def __init__(
        self,
        runtime: Runtime,
        model: LoadedModel | None,
        files: BlockFiles,
        facts: did.Opened,
        tell: Callable[[did.FromWorker], None],
    ) -> None:
        self.spec = runtime.spec
        self.worker = facts.worker
        self.model = model
        self.runtime = runtime
        self.lanes = runtime.lanes
        self.files = files
        self.facts = facts
        self.chunks = PrefillTasks(weakref.proxy(self))  # a reference cycle would keep the model when the engine closes
        self.tell = tell
        self._lock = threading.Lock()
        self._batch = DecodeBatch(self.spec, model)
        self._retired: set[int] = set()
        self._arrivals = Arrivals(runtime.pool)
        self._aborted: OrderedDict[int, tuple[str, bool]] = OrderedDict()
        self._preparing: threading.Thread | None = None
        self._adapters = did.AdaptersKept(self.worker, (), 0)

    def close(self) -> None:
        """End all work and free the pool, the model and the disk; blocks until no thread uses them."""
        self.runtime.close()
        self.files.close()
        if self._preparing is not None:
            self._preparing.join()

    # Messages of the gManager

    def reserve(self, sequence: int, start: int, stop: int) -> None:
        """Allocate missing blocks, which the ledger knows to be free. Work on the sequence may start (again)."""
        with self._lock:
            self._retired.discard(sequence)
        self.runtime.reserve(sequence, start, stop)

    def release_sequence(self, sequence: int) -> None:
        """Free all blocks of an idle sequence."""
        self._batch.leave(sequence)
        with self._lock:
            self._retired.discard(sequence)
        self._arrivals.drop(sequence)
        self.runtime.release_sequence(sequence)

    def retire(self, sequence: int) -> None:
        """Start no new work on a sequence, and tell the gManager when running work has ended."""
        with self._lock:
            self._retired.add(sequence)
        self._batch.leave(sequence)
        self.lanes.home.submit_next(self._retire_holding, sequence)

    def _retire_holding(self, sequence: int) -> None:
        """On the home lane, after its current call: wait for the holder lane, too, then answer."""
        told = partial(self.tell, did.Retired(self.worker, sequence))
        self.lanes.holder.retire(self.spec.engine, sequence).add_done_callback(lambda _: told())

    def join(self, state: SequenceState, holders: tuple[Endpoint, ...]) -> None:
        """Decode a sequence from the next window on."""
        with self._lock:
            self._retired.discard(state.sequence)
        self._batch.join(state, holders)

    def relocate(self, number: int, sequence: int, placement: Placement, holders: tuple[Endpoint, ...]) -> None:
        """Decode a sequence with another placement from the next window on; report when no window uses the old one."""
        self._batch.relocate(sequence, placement, holders)
        self.lanes.home.submit(self.tell, did.Relocated(self.worker, number))

    # Moves of blocks

    def expect(self, transfer: Transfer, sequence: int, start: int, stop: int) -> None:
        """Allocate blocks for a move, and report whether there was room."""
        refusal = ""
        try:
            self._arrivals.expect(transfer, sequence, start, stop)
        except CapacityError as error:
            refusal = str(error)
        self.tell(did.Expected(self.worker, transfer, refusal))

    def store_piece(self, piece: Piece, data: np.ndarray) -> str:
        """Store a received piece of a block; returns the reason if it is refused. May run in any thread."""
        try:
            self._arrivals.store_piece(piece, data)
        except DistKVError as error:
            if isinstance(error, DeviceLostError):  # the sender only learns that it was refused
                self.tell(did.Expected(self.worker, piece.transfer, str(error)))
            return str(error)
        return ""

    async def send(
        self,
        peer: Callable[[Piece, np.ndarray], Awaitable[str]],
        transfer: Transfer,
        sequence: int,
        tokens: range,
        pace: float,
    ) -> None:
        """Copy a sequence's blocks to ``peer``, which answers each piece, and report the result."""

        async def send(piece: Piece, data: np.ndarray) -> None:
            refusal = await asyncio.wait_for(peer(piece, data), self.spec.config.timeout_receive)
            if refusal:
                raise GangAbortedError(refusal)

        failure = ""
        try:
            await send_blocks(
                self.runtime.pool, transfer, sequence, tokens, send, self.spec.config.move_tokens_per_step, pace
            )
        except (DistKVError, OSError, TimeoutError) as error:
            failure = in_words(error)
        self.tell(did.Sent(self.worker, transfer, failure))

    def free(self, sequence: int, start: int, stop: int) -> None:
        """Free blocks that moved away, or that a cancelled move had allocated."""
        self._arrivals.drop(sequence)
        self.runtime.pool.free(sequence, start, stop)
        with self._lock:
            self._retired.discard(sequence)

    def reset(self, epoch: int) -> None:
        """Stop decoding; windows of an older epoch, running ones included, commit nothing."""
        self._batch.reset(epoch)

    def abort(self, gang: int, reason: str, unused: bool) -> None:
        """End this worker's part in a gang, even if it has not started."""
        with self._lock:
            self._aborted[gang] = (reason, unused)
            if len(self._aborted) > _REMEMBERED:
                self._aborted.popitem(last=False)
        self.runtime.abort(gang, reason)

    # Tasks of step graphs

    def decode(self, window: DecodeWindow) -> int:
        """Run a window on the home lane over the sequences that have joined by its start, and commit it."""
        try:
            self.prepare_window()
            with metered() as parts:
                return self.lanes.home.submit(partial(self.run_window, window, parts)).result()
        except Exception as error:
            self.fail(window.gang, error)
            raise

    def prepare_window(self) -> None:
        """Compile schemas and read adapters of joining sequences.

        This is done during the windows of others, or before the first window if all wait.

        In most cases, the task of their prompt has already done it on this worker.
        """
        assert self.model is not None
        needs = self._batch.needs()
        waiting = [one for one in needs if not self.model.is_prepared(*one)]
        if not waiting:
            return
        if len(waiting) == len(needs):
            self._prepare(waiting)
        elif self._preparing is None or not self._preparing.is_alive():
            self._preparing = threading.Thread(target=self._prepare, args=[waiting], name="distkv-prepare", daemon=True)
            self._preparing.start()

    def _prepare(self, needs: Sequence[tuple[SamplingParams, Adapter | None]]) -> None:
        assert self.model is not None
        for one in needs:
            self.model.prepare(*one)

    def run_window(self, window: DecodeWindow, parts: dict[str, float]) -> int:
        """On the home lane: run a window and send its tokens to the gManager; returns the number of its steps."""
        self.check(window.gang)
        batch, holders = self._batch.of_window(window)
        self.tell(did.WindowStarted(self.worker, window.window))
        result = WindowResult({}, {}, 0, 0.0)
        if batch:
            gap = self._batch.gap()
            with computing(parts, lambda: self.runtime.exchanged):
                result = self.runtime.decode(replace(window, gang=replace(window.gang, holders=holders)), batch)
            result = replace(result, gap=gap)
        self._batch.commit(window, batch, result)
        self.tell_adapters()
        used = tuple(holder.worker for holder in holders)
        self.tell(did.WindowDone(self.worker, window.window, window.gang.epoch, result, used))
        return result.steps

    def tell_adapters(self) -> None:
        """Tell the gManager which adapters are in memory, if that has changed since the last time."""
        assert self.model is not None
        kept = did.AdaptersKept(self.worker, self.model.adapters.paths, self.model.adapters.nbytes)
        if kept != self._adapters:
            self._adapters = kept
            self.tell(kept)

    def attend(self, gang: Gang) -> Attended:
        """Serve one gang as a holder until its home ends it."""
        try:
            self.check(gang)
            with metered_session() as done:
                done.append(stats := self.runtime.open_session(gang).wait())
        except Exception as error:
            with self._lock:
                unused = self._aborted.get(gang.number, ("", False))[1]
            if unused:
                return Attended()
            self.fail(gang, error)
            raise
        return Attended(stats.requests, stats.bytes_in, stats.bytes_out)

    def is_retired(self, sequence: int) -> bool:
        """Whether no new work may start on a sequence."""
        with self._lock:
            return sequence in self._retired

    def check(self, gang: Gang) -> None:
        """Raise GangAbortedError if a gang was aborted."""
        with self._lock:
            if gang.number in self._aborted:
                raise GangAbortedError(f"gang {gang.name} was aborted: {self._aborted[gang.number][0]}")

    def fail(self, gang: Gang, error: Exception) -> None:
        """Tell the gManager that a gang failed here, unless it aborted it.

        Pending work of a closing lane is cancelled: this worker leaves.
        """
        with self._lock:
            if gang.number in self._aborted:
                return
        if isinstance(error, CancelledError):
            error = EngineClosedError(f"worker {self.worker} closed its lanes before it ran {gang.name}")
        told = portable(error, f"worker {self.worker} in {gang.name}")
        self.tell(did.GangFailed(self.worker, gang.number, told))
