"""A simulated cluster that works in any order, loses workers and fails gangs, and checks its commands."""

from __future__ import annotations

import itertools
import random
from array import array
from collections import defaultdict
from dataclasses import replace
from typing import Any

from hypothesis import strategies as st

from distkv_dask.config import Config
from distkv_dask.errors import DistKVError, GangAbortedError, InvalidRequestError
from distkv_dask.gang import DecodeWindow, PrefillChunk
from distkv_dask.messages import from_worker as did
from distkv_dask.messages import to_worker as to
from distkv_dask.messages.client_calls import Delivery, Generate, Ingest, Load, Save, Submission
from distkv_dask.messages.names import HOST_MEMORY, OWN_DISK, Saved
from distkv_dask.placement import Endpoint, Move
from distkv_dask.sampling import FinishReason, SamplingParams
from distkv_dask.scheduler import commands as do
from distkv_dask.scheduler.cache.copies import copy_ahead
from distkv_dask.scheduler.ledger.invariants import check_ledger
from distkv_dask.scheduler.lifecycle.events import (
    Drain,
    Event,
    Pause,
    Stop,
    StopAll,
    Submit,
    Tick,
    WorkerLost,
    WorkerReady,
)
from distkv_dask.scheduler.lifecycle.machine import Lifecycle
from distkv_dask.scheduler.moves.migration import can_start, full_tokens, start
from distkv_dask.scheduler.records.machine_state import MachineState
from distkv_dask.scheduler.records.states import Decode
from distkv_dask.scheduler.records.states import Stored as StoredState
from distkv_dask.simulate.memory import Memory, Table
from distkv_dask.simulate.workers import Asked, Decoding, Workers

BLOCK = 4
EOS_EVERY = 23

OfMove = to.Expect | to.Send | to.Relocate
"""Messages of moves."""


def blocks(start: int, stop: int) -> range:
    return range(start // BLOCK, -(-stop // BLOCK) if stop > start else 0)


def token(sequence: int, index: int) -> int:
    """The model of the simulation: the token number ``index`` of a sequence in any correct run."""
    return sequence * 1000 + index


class Simulated(Workers):
    """Workers that execute commands, and the set of possible next events."""

    memory: Memory

    def __init__(self, machine: Lifecycle, rng: random.Random) -> None:
        super().__init__(Memory(machine.state))
        self.machine, self.rng = machine, rng
        self.moves: list[OfMove] = []
        self.retirements: list[tuple[str, int]] = []
        self.files: list[to.Store | to.Fetch] = []
        self.refusing = False
        self.tokens: dict[int, list[int]] = defaultdict(list)
        self.ends: dict[int, tuple[FinishReason, Exception | None]] = {}
        self.reused: dict[int, int] = {}
        self.poisoned: set[int] = set()
        self.now = 0.0
        self.step_seconds = 0.05
        self.lengths: list[float] = []
        self.refusals: dict[int, Exception] = {}
        self.seen: list[do.Command] = []
        self.names = itertools.count()

    @property
    def life(self) -> MachineState:
        """The state machine's state."""
        return self.machine.state

    @property
    def pools(self) -> dict[str, dict[int, Table]]:
        """Blocks by worker and sequence."""
        return self.memory.pools

    @property
    def disks(self) -> dict[str, dict[str, Table]]:
        """Files by worker."""
        return self.memory.disks

    @property
    def hosts(self) -> dict[str, dict[str, Table]]:
        """Contents of host memory by worker, named like files."""
        return self.memory.hosts

    def watch(self) -> list[do.Command]:
        """A list that collects all commands from now on."""
        self.seen = []
        return self.seen

    def handle(self, event: Event, now: float | None = None) -> None:
        """Handle an event, and execute the commands of the state machine."""
        for command in self.machine.handle(event, self.now if now is None else now):
            self.enact(command)
        self.check()

    def check(self) -> None:
        check_ledger(self.life.ledger)
        for worker, account in self.life.ledger.workers.items():
            assert self.memory.used(worker) <= account.used + account.cached
            in_memory = sum(map(len, self.hosts[worker].values())) * self.life.block_bytes
            assert in_memory <= self.life.disks.memory.capacity[worker]
        self.now += 0.01

    def enact(self, command: do.Command) -> None:
        self.seen.append(command)
        match command:
            case to.Release(worker, sequence):
                assert (worker, sequence) not in self.retirements
            case to.Retire(worker, sequence):
                self.retirements.append((worker, sequence))
            case do.SubmitWindow(window, _):
                self.lengths.append(window.seconds)
            case to.Expect():
                self.moves.append(command)
                if self.refusing and self.rng.random() < 0.3:
                    return  # nothing is allocated
            case to.Send() | to.Relocate():
                self.moves.append(command)
            case to.Store(worker, _, sequence):
                assert (worker, sequence) not in self.retirements
                assert sequence not in self.batches[worker]
                self.files.append(command)
            case to.Fetch():
                self.files.append(command)
            case do.Refuse(sequence, error):
                self.refusals[sequence] = error
            case Delivery(sequence, tokens, reason, error):
                assert sequence not in self.ends, "news after the end"
                self.reused[sequence] = command.reused
                self.tokens[sequence].extend(tokens)
                if reason is not None:
                    self.ends[sequence] = (reason, error)
        super().enact(command)

    def drop_file(self, worker: str, name: str) -> None:
        """Remove a file from a worker's disk or host memory."""
        for tier in (self.disks, self.hosts):
            tier[worker].pop(name, None)

    def go_on(self, message: Asked) -> None:
        """Execute a message on its worker, and handle the answer."""
        answer = self.answer(message)
        to_disk = isinstance(message, to.Store) and message.saved.place in (OWN_DISK, HOST_MEMORY)
        if isinstance(answer, did.Stored) and to_disk and self.refusing and self.rng.random() < 0.2:
            for file in answer.files:
                self.drop_file(answer.worker, file.name)
            answer = replace(answer, files=(), error=OSError("the disk is full"))
        if answer is not None:
            self.handle(answer)

    def draw(
        self, sequence: int, entry: Decoding, count: int
    ) -> tuple[list[int], FinishReason | None, DistKVError | None]:
        """Answers end by themselves at some tokens, and poisoned ones fail."""
        first = entry.last - sequence * 1000 + 1
        upto = next((index for index in range(first, first + count) if index % EOS_EVERY == 0), first + count)
        drawn = [token(sequence, index) for index in range(first, upto)]
        if upto < first + count:
            return drawn, "stop", None
        if sequence in self.poisoned and len(drawn) < entry.remaining:
            return drawn, "error", InvalidRequestError(f"{sequence} is to blame")
        return drawn, None, None

    # Actions of clients

    def submit(self, number: int, prompt: array[int], sampling: SamplingParams, **how: object) -> None:
        """Submit a request; raises if it is refused."""
        self.send(Generate(number, prompt, sampling, **how))  # type: ignore[arg-type]

    def ingest(self, number: int, prompt: array[int], **how: object) -> None:
        """Ingest a document."""
        self.send((Load if "saved" in how else Ingest)(number, prompt, **how))  # type: ignore[arg-type]

    def save(self, number: int, document: int, saved: Saved) -> None:
        """Save a document."""
        self.send(Save(number, document, saved))

    def send(self, *submissions: Submission) -> None:
        """Send several submissions at once; raises the first refusal."""
        self.refusals.clear()
        self.handle(Submit(submissions))
        for error in self.refusals.values():
            raise error

    def stop(self, number: int, reason: FinishReason = "cancelled") -> None:
        """Stop a request."""
        self.handle(Stop(number, reason))

    # Possible events

    def drain(self, worker: str, leaving: bool = True) -> None:
        """Make a worker leave, or stay after all."""
        self.handle(Drain(worker, leaving))

    def pause(self, *workers: str) -> None:
        """Pause these workers, and no others, as Dask does."""
        self.handle(Pause(frozenset(workers)))

    def tick(self, later: float = 0.0) -> None:
        """Let time pass."""
        self.handle(Tick(), self.now + later)

    def start_move(self, move: Move) -> None:
        """Start a move that no policy proposed."""
        start(self.life, move)
        copy_ahead(self.life)  # as after any event
        commands = [*self.life.commands]
        self.life.commands.clear()
        for command in commands:
            self.enact(command)
        self.check()

    def add_worker(self, capacity: int) -> None:
        worker = f"w{next(self.names)}"
        self.add(worker)
        endpoint = Endpoint(worker, "127.0.0.1", 1)
        tiers = self.life.config.spill, self.life.config.host_memory or 0
        self.handle(WorkerReady(endpoint, capacity, True, *tiers))

    def lose_worker(self, worker: str | None = None) -> None:
        if len(self.pools) > 1:
            worker = worker or self.rng.choice(sorted(self.pools))
            self.remove(worker)
            self.retirements = [one for one in self.retirements if one[0] != worker]
            self.handle(WorkerLost(worker))

    def happen(self, mishap: str) -> None:
        """Trigger one of :data:`mishaps` to workers, gangs, moves and files; anything else is a step."""
        match mishap:
            case "lose":
                self.lose_worker()
            case "join":
                self.add_worker(12)
            case "fail":
                self.fail_some_gang(GangAbortedError("a peer was silent"))
            case "fault":
                self.fail_some_gang(ValueError("a fault"))
            case "poison" if self.life.requests:  # its next window cannot sample its token
                self.poisoned.add(self.rng.choice(sorted(self.life.requests)))
            case "move":
                self.move_something()
            case "drain" | "stay":
                self.drain(self.rng.choice(sorted(self.pools)), mishap == "drain")
            case "rot":
                self.lose_file()
            case "stall":  # no worker begins anything
                for wait in (0, self.life.config.timeout_start + 1):
                    self.tick(wait)
            case "late":
                self.tick(self.life.config.timeout_receive + 1)
            case _:
                self.step()

    def lose_file(self) -> None:
        """Lose a file on a disk, or in host memory."""
        tiers = *self.disks.items(), *self.hosts.items()
        if files := [(worker, name) for worker, names in tiers for name in names]:
            self.drop_file(*self.rng.choice(files))

    def move_something(self) -> None:
        """Move random blocks of a random sequence, if that is possible now."""
        ledger, life = self.life.ledger, self.life
        numbers = [
            number for number in ledger.sequences if isinstance(self.life.requests[number].state, Decode | StoredState)
        ]
        if not numbers:
            return
        number = self.rng.choice(numbers)
        span = self.rng.choice(ledger.sequences[number].placement)
        full = (min(span.stop, full_tokens(life, number)) - span.start) // BLOCK
        if full > 0:
            first = self.rng.randrange(full)
            stop = span.start + self.rng.randint(first + 1, full) * BLOCK
            move = Move(number, span.start + first * BLOCK, stop, span.worker, self.rng.choice(sorted(self.pools)))
            if can_start(life, move):
                self.start_move(move)

    def step(self) -> bool:
        """Run one task or answer one message; False when there is nothing to do."""
        choices = self.choices()
        if choices:
            self.take(self.rng.choice(choices))
        return bool(choices)

    def choices(self) -> list[object]:
        """Prompts whose next chunk may be computed, homes with windows, and messages that may be answered."""
        busy = [home for home, queue in self.windows.items() if queue and home in self.pools]
        return [*self.chunks, *busy, *self.retirements, *self.moves, *self.files]

    def take(self, choice: object) -> None:
        """Execute one of these."""
        match choice:
            case str():
                self.run_window(self.windows[choice][0])
            case to.Expect() | to.Send() | to.Relocate():
                self.moves.remove(choice)
                self.go_on(choice)
            case to.Store() | to.Fetch():
                self.files.remove(choice)
                self.go_on(choice)
            case list():
                self.run_chunk(choice[0])
            case tuple():
                self.retirements.remove(choice)
                self.go_on(to.Retire(*choice))

    def run_chunk(self, chunk: PrefillChunk) -> None:
        self.handle(did.ChunkStarted(chunk.gang.home, chunk.gang.number))
        self.handle(self.compute(chunk))

    def run_window(self, window: DecodeWindow) -> None:
        home = window.gang.home
        self.handle(did.WindowStarted(home, window.window))
        parts = {number: (self.rng.randint(1, 6), entry.placement) for number, entry in self.batches[home].items()}
        self.handle(self.decode(window, parts, 1, self.step_seconds))

    def fail_some_gang(self, error: Exception) -> None:
        gangs = [queue[0].gang for queue in self.windows.values() if queue]
        gangs += [chain[0].gang for chain in self.chunks if chain]
        if gangs:
            failed = self.rng.choice(gangs)
            self.handle(did.GangFailed(failed.home, failed.number, error))


def assert_nothing_left(cluster: Simulated) -> None:
    """Check that no requests are left, and only cached blocks, which are freed when the engine closes."""
    life = cluster.life
    assert not life.requests
    assert not life.ledger.sequences
    for worker, account in life.ledger.workers.items():
        assert account.used == 0
        assert sum(map(len, cluster.pools[worker].values())) == account.cached
    assert not any(cluster.hosts.values())
    assert not life.disks.memory.used
    cluster.handle(StopAll())
    assert len(life.cache) == 0
    assert not life.extents.by_number
    assert not life.extents.index
    assert not life.disks.disk.used
    while cluster.step():  # copies that were in progress
        pass
    assert not any(cluster.disks.values())
    assert not any(cluster.pools.values())


def cluster_of(seed: int, *capacities: int, **config: Any) -> Simulated:
    settings = {"block_tokens": BLOCK, "prefill_chunk_tokens": 8, "window_batch": 4, "spill": 1500}
    settings |= {"prefix_cache_tier": "memory"} | config
    state = MachineState("engine", Config.load(**settings), itertools.count(1), block_bytes=100)
    simulated = Simulated(Lifecycle(state), random.Random(seed))
    for capacity in capacities:
        simulated.add_worker(capacity)
    return simulated


def expected(sequence: int, new: int) -> list[int]:
    return [token(sequence, index) for index in range(min(new, EOS_EVERY))]


def finish(cluster: Simulated) -> None:
    for _ in range(5000):
        if not cluster.step():
            return
    raise AssertionError(f"it goes on forever: {cluster.life.requests}")


def settle(cluster: Simulated) -> None:
    """Finish, and end requests that wait for workers that do not come."""
    for wait in (0.0, *[1e6] * 6):  # requests that return to the queue are found to be stuck one round later, and so on
        cluster.now += wait
        cluster.tick()
        finish(cluster)


mishaps = st.lists(
    st.sampled_from(
        ["lose", "join", "fail", "fault", "poison", "cancel", "drain", "stay", "stall", "late", "rot"]
        + ["move"] * 3
        + ["step"] * 6
    ),
    max_size=80,
)
