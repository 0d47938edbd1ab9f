"""One engine in the gManager: its workers, its lifecycle, and the handles of its clients."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace

from distkv_dask.completion import Timings
from distkv_dask.errors import ClusterError, EngineClosedError
from distkv_dask.geometry import Geometry
from distkv_dask.messages.client_calls import Attached, Delivery, EngineFacts
from distkv_dask.messages.from_worker import AdaptersKept, ChunkDone, Opened, Prefilled
from distkv_dask.messages.names import HANDLE_NUMBERS, EngineSpec
from distkv_dask.messages.status import EngineStatus
from distkv_dask.messages.to_worker import Open
from distkv_dask.scheduler.costs.pacer import Pacer
from distkv_dask.scheduler.engines.figures import Figures
from distkv_dask.scheduler.engines.group import Group
from distkv_dask.scheduler.engines.link_record import LinkRecord
from distkv_dask.scheduler.engines.opening import Opening
from distkv_dask.scheduler.engines.outbox import Outbox
from distkv_dask.scheduler.engines.status import status_of
from distkv_dask.scheduler.lifecycle import retries
from distkv_dask.scheduler.lifecycle.machine import Lifecycle
from distkv_dask.scheduler.moves.drain import fits_elsewhere
from distkv_dask.scheduler.records.machine_state import MachineState
from distkv_dask.scheduler.records.states import Prefill, Waiting


class EngineState:
    """Opening, closing, the handles and counters of one engine.

    Parameters
    ----------
    spec
        The client's model and settings.
    client
        Id of the Dask client that owns the engine; it has the first handle.
    gang_numbers
        Numbers unique over all engines of the gManager.
    pacer
        The scheduler's budget for all engines.
    """

    def __init__(self, spec: EngineSpec, client: str, gang_numbers: Iterator[int], pacer: Pacer) -> None:
        self.spec = spec
        self.client = client
        self.machine = Lifecycle(MachineState(spec.engine, spec.config, gang_numbers, pacer))
        self.facts: dict[str, Opened] = {}
        self.opening = Opening(self.facts)
        self.geometry: Geometry | None = None
        """Sizes of the model, once a worker has loaded it; they are sent to memory workers."""
        self.span = spec.span
        """Dask span of tasks submitted from now on; None: Dask's default one."""
        self.group = Group(spec) if spec.config.stage_count > 1 else None
        """The workers among which layers are divided, if they are."""
        self.links = LinkRecord(self.facts, spec.config)
        self.figures = Figures()
        self.is_closing = False
        self.broken: EngineClosedError | None = None
        """The error of every request once the state machine has failed."""
        self._handle_numbers = itertools.count(1)
        self.handles = {0: Outbox(client)}
        """Handles of the engine; request ``n`` belongs to handle ``n // HANDLE_NUMBERS``."""

    @property
    def life(self) -> MachineState:
        """The state of its state machine."""
        return self.machine.state

    @property
    def layers(self) -> int:
        """Layers of the model with distributed KV; 0 before a worker has loaded it."""
        return 0 if self.geometry is None else len(self.geometry.far_layers)

    # Opening and closing

    def ready(self, facts: Opened) -> None:
        """A worker opened the engine."""
        if self.is_closing:
            return  # CLOSE is on its way there
        self.facts[facts.worker] = facts
        if facts.role == "stage":
            self.opening.answered(facts.worker)
            return
        self.life.block_bytes, self.geometry = facts.block_bytes, facts.geometry
        if self.geometry.home_bytes:
            self.life.keep_states(self.geometry.home_bytes)
        self.fit_costs()
        self.opening.answered(facts.worker)

    def fit_costs(self) -> None:
        """Fit the performance model to what was measured of workers and links."""
        if self.geometry is not None:
            self.life.know_costs(self.links.model(self.geometry))

    def open_failed(self, worker: str, error: Exception) -> None:
        """A worker could not open the engine and is not part of it."""
        if not self.is_closing:
            self.opening.failed(worker, error)

    def open_stage(self, worker: str) -> list[Open]:
        """A worker takes a stage, or stands by; what is sent for it."""
        if self.group is None or not self.group.assign_stage(worker):
            self.opening.answered(worker)
            return []
        self.opening.ask(worker)
        return self.group.openings(worker, self.facts)

    def closed(self, worker: str) -> None:
        """A worker freed everything of the engine."""
        self.facts.pop(worker, None)
        self.opening.answered(worker)

    def adapters_kept(self, message: AdaptersKept) -> None:
        """A worker has other adapters in memory."""
        if (facts := self.facts.get(message.worker)) is not None:
            self.facts[message.worker] = replace(facts, adapters=message)

    def worker_lost(self, worker: str) -> None:
        """A worker died or left."""
        self.facts.pop(worker, None)
        self.links.remove_worker(worker)
        self.opening.lost(worker)

    def knows(self, worker: str) -> bool:
        """Whether the engine is open on a worker, or being opened there."""
        return self.opening.is_asked(worker) or worker in self.facts

    def waits_for(self, gang: int) -> bool:
        """Whether a chunk or window is still expected, and the engine is not closing."""
        return not self.is_closing and retries.owner(self.life, gang) is not None

    def is_drained(self, worker: str) -> bool:
        """Whether a worker has no blocks."""
        return self.life.is_drained(worker)

    def needs(self) -> set[str]:
        """Workers that must not be scaled down: opening, expected, or with blocks that fit nowhere else."""
        life = self.life
        if any(isinstance(request.state, Waiting) for request in life.requests.values()):
            return self.opening.pending | set(self.facts)
        stages = () if self.group is None else filter(None, self.group.places)
        needed, leaving = {*self.opening.pending, *stages}, set[str]()
        ledger = life.ledger
        for worker in sorted(ledger.workers, key=lambda name: ledger.workers[name].used):
            if fits_elsewhere(ledger, leaving | {worker}):
                leaving.add(worker)
            else:
                needed.add(worker)
        return needed

    async def wait_usable(self, limit: float) -> None:
        """Wait until the engine is open, and a worker can decode.

        Raises
        ------
        DistKVError
            Why it could not be opened.
        EngineClosedError
            It is closing.
        ClusterError
            It has no such worker, and got none within ``limit`` seconds.
        """
        name, opening = self.spec.engine, self.opening
        is_ready = await opening.until(lambda: self.is_closing or opening.can_decode, limit)
        if self.is_closing:
            raise opening.failure or EngineClosedError(f"engine {name} is closing")
        if not is_ready:
            raise ClusterError(
                f"engine {name} has no worker now that loads its model, and got none within {limit:g} s "
                "(distkv.timeouts.open): start some (cluster.scale(n)), or see the logs of those that run"
            )

    def start_closing(self) -> None:
        """From now on answers mean that a worker closed the engine; long polls end."""
        self.is_closing = True
        for outbox in self.handles.values():
            outbox.close()
        self.opening.pending |= set(self.facts)
        self.opening.changed()

    def open_on(self) -> list[str]:
        """Workers that have to close it."""
        return sorted(self.opening.pending)

    async def wait_closed(self, limit: float) -> None:
        """Wait for all workers to close the engine, but not longer than ``limit`` seconds."""
        await self.opening.settled(limit)

    # Handles and their events

    def attach(self, client: str) -> Attached:
        """Give a Dask client a handle, which receives events of its own requests only."""
        handle = next(self._handle_numbers)
        self.handles[handle] = Outbox(client)
        return Attached(replace(self.spec, token=""), self.summary(), handle)

    def detach(self, handle: int) -> list[int]:
        """Remove a handle; returns its requests and documents, which are no longer needed."""
        if (outbox := self.handles.pop(handle, None)) is not None:
            outbox.close()
        return [number for number in self.life.requests if number // HANDLE_NUMBERS == handle]

    def handles_of(self, client: str) -> list[int]:
        """Handles of a Dask client, except for the owner's first."""
        return [handle for handle, outbox in self.handles.items() if handle and outbox.client == client]

    def deliver(self, delivery: Delivery) -> None:
        """Deliver tokens or an end to the handle of the request."""
        if (outbox := self.handles.get(delivery.sequence // HANDLE_NUMBERS)) is not None:
            outbox.put(delivery)
        self.figures.generated(len(delivery.tokens))
        if delivery.reason is not None and delivery.generated is not None:
            self.figures.ended(delivery.reason, delivery.timings or Timings(), delivery.generated)

    def fail(self, error: Exception) -> None:
        """End every request with an error."""
        for sequence in self.life.requests:
            self.deliver(Delivery(sequence, (), "error", error))

    async def take_events(self, handle: int, heard: int, wait: float) -> list[Delivery]:
        """Events that a handle has not received, as :meth:`Outbox.take_unheard` returns them.

        Raises
        ------
        EngineClosedError
            The handle was removed.
        """
        if handle not in self.handles:
            raise EngineClosedError("the scheduler lost this handle of the engine: attach again")
        return await self.handles[handle].take_unheard(heard, wait)

    # Figures

    def prefilled(self, done: ChunkDone | Prefilled) -> None:
        """Count a chunk of a prompt that is done, before the state machine drops it."""
        self.figures.exchanged(done.exchanged)
        request = self.life.requests.get(done.sequence)
        if request is not None and isinstance(request.state, Prefill) and done.gang in request.state.chunks:
            self.figures.prefilled(len(request.state.chunks[done.gang].tokens))

    def summary(self) -> EngineFacts:
        """What the engine's clients know of its workers."""
        one = next(iter(self.facts.values()))
        return EngineFacts(
            max_positions=one.geometry.max_positions or math.inf,
            vocab_size=one.geometry.vocab_size,
            block_bytes=one.block_bytes,
            dtype=one.geometry.dtype,
            fingerprint=max(facts.fingerprint for facts in self.facts.values()),
            workers=len(self.facts),
        )

    def status(self) -> EngineStatus:
        """A snapshot: workers, sequences, debts and totals."""
        return status_of(self.life, self.figures, self.facts)
