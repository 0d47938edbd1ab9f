"""A simulated cluster that does things in any order, loses workers and fails gangs, and checks its orders."""

from __future__ import annotations

import itertools
import random
from array import array
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from hypothesis import strategies as st

from distkv_dask.config import Config
from distkv_dask.errors import DistKVError, GangAbortedError, InvalidRequestError
from distkv_dask.messages import from_worker as did
from distkv_dask.messages import to_worker as to
from distkv_dask.messages.client_calls import Delivery, Submission
from distkv_dask.messages.names import Saved, SavedFile
from distkv_dask.scheduler import commands as do
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
from distkv_dask.scheduler.lifecycle.request import Decode
from distkv_dask.scheduler.lifecycle.request import Stored as StoredState
from distkv_dask.scheduler.lifecycle.state import MachineState
from distkv_dask.scheduler.moves.moving import can_start, full_tokens, start
from distkv_dask.types import (
    DecodeWindow,
    Endpoint,
    Exchanged,
    FinishReason,
    Gang,
    Move,
    Placement,
    PrefillChunk,
    SamplingParams,
    WindowResult,
)

BLOCK = 4
EOS_EVERY = 23


def blocks(start: int, stop: int) -> range:
    return range(start // BLOCK, -(-stop // BLOCK) if stop > start else 0)


def token(sequence: int, index: int) -> int:
    """The model of the simulation: what any correct run generates as a sequence's token number ``index``."""
    return sequence * 1000 + index


@dataclass
class Simulated:
    """Workers that enact commands: pools by sequence, batches by home, and a bag of runnable tasks.

    A pool has for each sequence its logical blocks, and of each the tokens whose KV it holds.
    """

    machine: Lifecycle
    rng: random.Random
    pools: dict[str, dict[int, dict[int, tuple[int, ...]]]] = field(default_factory=dict)
    placements: dict[int, Placement] = field(default_factory=dict)
    moves: list[to.Expect | to.Send | to.Relocate] = field(default_factory=list)
    refusing: bool = False
    batches: dict[str, dict[int, tuple[int, int, int]]] = field(default_factory=dict)
    epochs: dict[str, int] = field(default_factory=dict)
    chunks: list[list[PrefillChunk]] = field(default_factory=list)
    windows: dict[str, list[DecodeWindow]] = field(default_factory=lambda: defaultdict(list))
    attending: set[tuple[int, str]] = field(default_factory=set)
    retirements: list[tuple[str, int]] = field(default_factory=list)
    tokens: dict[int, list[int]] = field(default_factory=lambda: defaultdict(list))
    ends: dict[int, tuple[FinishReason, Exception | None]] = field(default_factory=dict)
    reused: dict[int, int] = field(default_factory=dict)
    disks: dict[str, dict[str, dict[int, tuple[int, ...]]]] = field(default_factory=dict)
    files: list[to.Store | to.Fetch] = field(default_factory=list)
    poisoned: set[int] = field(default_factory=set)
    now: float = 0.0
    allocated: set[int] = field(default_factory=set)
    step_seconds: float = 0.05
    lengths: list[float] = field(default_factory=list)
    refusals: dict[int, Exception] = field(default_factory=dict)
    seen: list[do.Command] = field(default_factory=list)

    @property
    def life(self) -> MachineState:
        """What the state machine knows."""
        return self.machine.state

    def watch(self) -> list[do.Command]:
        """A list of all commands from now on."""
        self.seen = []
        return self.seen

    def handle(self, event: Event, now: float | None = None) -> None:
        """Let something happen, and do what the state machine asks for."""
        for command in self.machine.handle(event, self.now if now is None else now):
            self.enact(command)
        self.check()

    def check(self) -> None:
        self.life.ledger.check()
        for worker, account in self.life.ledger.workers.items():
            assert sum(map(len, self.pools[worker].values())) <= account.used + account.cached
        self.now += 0.01

    def enact(self, command: do.Command) -> None:
        self.seen.append(command)
        match command:
            case to.Reserve(worker, sequence, start, stop):
                self.reserve(worker, sequence, start, stop)
            case to.Release(worker, sequence):
                assert (worker, sequence) not in self.retirements
                self.pools[worker].pop(sequence, None)  # nothing is there of a move that has only begun
            case to.Retire(worker, sequence):
                self.batches[worker].pop(sequence, None)
                self.retirements.append((worker, sequence))
            case do.SubmitPrefill(chunks):
                self.chunks.append(list(chunks))
                for chunk in chunks:
                    self.attend(chunk.gang, chunk.gang.holders)
            case do.SubmitWindow(window, after):
                queued = self.windows[window.gang.home]
                assert (after is None) == (not queued)
                queued.append(window)
                self.lengths.append(window.seconds)
                self.attend(window.gang, window.gang.holders)
            case do.AddHolders(gang, holders):
                self.attend(gang, holders)
            case to.Join(home, state, _):
                assert (
                    state.length
                    == len(self.life.requests[state.sequence].prompt)
                    + len(self.life.requests[state.sequence].generated)
                    - 1
                )
                self.batches[home][state.sequence] = (state.length, state.last_token, state.remaining)
                self.placements[state.sequence] = state.placement
            case to.Expect() | to.Send() | to.Relocate():
                self.moves.append(command)
                if isinstance(command, to.Expect) and not (self.refusing and self.rng.random() < 0.3):
                    # at once: what is sent to one worker arrives in order, so before a FREE or RELEASE of it
                    self.reserve(command.worker, command.sequence, command.start, command.stop)
                    self.allocated.add(command.number)
                if isinstance(command, to.Relocate):
                    assert command.sequence in self.batches[command.worker]
                    self.placements[command.sequence] = command.placement
            case to.Free(worker, sequence, start, stop):
                if worker in self.pools:
                    for block in blocks(start, stop):
                        self.pools[worker].get(sequence, {}).pop(block, None)
                    if not self.pools[worker].get(sequence, True):
                        del self.pools[worker][sequence]
            case to.Store(worker, _, sequence):
                assert (worker, sequence) not in self.retirements
                assert sequence not in self.batches[worker]
                self.files.append(command)
            case to.Fetch():
                self.files.append(command)
            case to.Discard(worker, names):
                for name in names:
                    self.disks.get(worker, {}).pop(name, None)
            case to.Reset(home, epoch):
                self.batches[home].clear()
                self.epochs[home] = epoch
            case to.Abort(worker, gang, _, _):
                assert worker in self.pools
                self.attending.discard((gang, worker))
            case do.Forget(gang, finished):
                if not finished:
                    for chain in self.chunks:
                        chain[:] = [chunk for chunk in chain if chunk.gang.number != gang.number]
                    self.windows[gang.home] = [w for w in self.windows[gang.home] if w.gang.number != gang.number]
            case do.Refuse(sequence, error):
                self.refusals[sequence] = error
            case Delivery(sequence, tokens, reason, error):
                assert sequence not in self.ends, "news after the end"
                self.reused[sequence] = command.reused
                self.tokens[sequence].extend(tokens)
                if reason is not None:
                    self.ends[sequence] = (reason, error)

    def reserve(self, worker: str, sequence: int, start: int, stop: int) -> None:
        table = self.pools[worker].setdefault(sequence, {})
        for block in blocks(start, stop):
            table.setdefault(block, ())  # a sequence that is mended keeps what it has
        assert sum(map(len, self.pools[worker].values())) <= self.life.ledger.workers[worker].capacity

    def store(self, sequence: int, placement: Placement, start: int, stop: int, more: Sequence[int] = ()) -> None:
        """Compute the KV of some tokens: all before them has to be where the placement says.

        ``more`` is what was generated since the last commit.
        """
        live = self.life.requests[sequence]
        text = [*live.prompt, *live.generated, *more]
        for span in placement:
            owner = sequence if span.document is None else span.document
            for block in blocks(span.start, min(span.stop, start)):
                there = self.pools[span.worker][owner][block]
                wanted = text[block * BLOCK : min(start, (block + 1) * BLOCK)]
                assert [*there[: len(wanted)]] == wanted, "KV is not where the home looks for it"
            for block in blocks(max(span.start, start), min(span.stop, stop)):
                assert owner == sequence, "written into a document's blocks"
                self.pools[span.worker][sequence][block] = tuple(text[block * BLOCK : min(stop, (block + 1) * BLOCK)])

    def go_on(self, message: to.Expect | to.Send | to.Relocate) -> None:
        """A worker works on one message of a move, and answers."""
        match message:
            case to.Expect(worker, number):
                if worker not in self.pools:
                    return
                self.handle(did.Expected(worker, number, "" if number in self.allocated else "no room"))
            case to.Send(worker, number, sequence, start, stop, target, _):
                if worker not in self.pools:
                    return
                tables = [self.pools.get(one, {}).get(sequence, {}) for one in (worker, target)]
                wanted = set(blocks(start, stop))
                failure = "not expected any more" if not all(wanted <= {*table} for table in tables) else ""
                if not failure:
                    tables[1].update({block: tables[0][block] for block in wanted})
                self.handle(did.Sent(worker, number, failure))
            case to.Relocate(home, number):
                if home in self.pools:
                    self.handle(did.Relocated(home, number))

    def use_disk(self, message: to.Store | to.Fetch) -> None:
        """A worker writes blocks to its disk, or fills them from its own and others' disks."""
        worker = message.worker
        if worker not in self.pools:
            return
        table, failure = self.pools[worker].get(message.sequence, {}), None
        if isinstance(message, to.Store):
            files = []
            for start, stop in message.ranges:
                name = f"{message.saved.tag}-{start}"
                files.append(SavedFile(name, start, stop, 0, 0))
                # a sequence that was given up meanwhile is written all the same, and of no use
                self.disks[worker][name] = {block: table[block] for block in blocks(start, stop) if block in table}
            if self.refusing and self.rng.random() < 0.2:
                for file in files:
                    del self.disks[worker][file.name]
                files, failure = [], OSError("the disk is full")
            self.handle(did.Stored(worker, message.number, tuple(files), failure))
            return
        for start, stop in message.ranges:
            for block in blocks(start, stop):
                held = [file for file in message.saved.files if block in blocks(file.start, file.stop)]
                if not held or held[0].name not in self.disks.get(held[0].worker, {}):
                    failure = OSError("not on any disk")
                    continue
                assert block in table, "read into somebody else's blocks"
                table[block] = self.disks[held[0].worker][held[0].name][block]
        self.handle(did.Fetched(worker, message.sequence, failure))

    def attend(self, gang: Gang, holders: tuple[Endpoint, ...]) -> None:
        for holder in holders:
            assert holder.worker in self.pools
            assert holder.worker != gang.home
            self.attending.add((gang.number, holder.worker))

    # What clients do

    def submit(self, number: int, prompt: array[int], sampling: SamplingParams, **how: object) -> None:
        """Ask; raises where the request is refused."""
        self.send(Submission(number, prompt, sampling, **how))  # type: ignore[arg-type]

    def ingest(self, number: int, prompt: array[int], **how: object) -> None:
        """Hand in a document."""
        self.send(Submission(number, prompt, None, **how))  # type: ignore[arg-type]

    def save(self, number: int, document: int, saved: Saved) -> None:
        """Save a document."""
        self.send(Submission(number, array("i"), None, document=document, saved=saved))

    def send(self, *submissions: Submission) -> None:
        """Ask for several things at once; raises the first refusal."""
        self.refusals.clear()
        self.handle(Submit(submissions))
        for error in self.refusals.values():
            raise error

    def stop(self, number: int, reason: FinishReason = "cancelled") -> None:
        """Stop a request."""
        self.handle(Stop(number, reason))

    # What may happen next

    def drain(self, worker: str, leaving: bool = True) -> None:
        """Let a worker leave, or stay after all."""
        self.handle(Drain(worker, leaving))

    def pause(self, *workers: str) -> None:
        """Dask pauses these workers, and no others."""
        self.handle(Pause(frozenset(workers)))

    def tick(self, later: float = 0.0) -> None:
        """Some time has passed."""
        self.handle(Tick(), self.now + later)

    def start_move(self, move: Move) -> None:
        """Start a move that no policy proposed."""
        start(self.life, move)
        commands = [*self.life.commands]
        self.life.commands.clear()
        for command in commands:
            self.enact(command)
        self.check()

    def add_worker(self, capacity: int) -> None:
        worker = f"w{next(self.names)}"
        self.pools[worker], self.batches[worker], self.epochs[worker] = {}, {}, 0
        self.disks[worker] = {}
        endpoint = Endpoint(worker, "127.0.0.1", 1)
        self.handle(WorkerReady(endpoint, capacity, spill_bytes=self.life.config.spill))

    names: itertools.count[int] = field(default_factory=itertools.count)

    def lose_worker(self, worker: str | None = None) -> None:
        if len(self.pools) > 1:
            worker = worker or self.rng.choice(sorted(self.pools))
            del self.pools[worker], self.batches[worker], self.disks[worker]
            self.windows.pop(worker, None)
            self.retirements = [one for one in self.retirements if one[0] != worker]
            for chain in self.chunks:
                if any(chunk.gang.home == worker for chunk in chain):
                    chain.clear()
            self.handle(WorkerLost(worker))

    def happen(self, mishap: str) -> None:
        """One of :data:`mishaps` to workers, gangs, moves and files; anything else is a step."""
        match mishap:
            case "lose":
                self.lose_worker()
            case "join":
                self.add_worker(12)
            case "fail":
                self.fail_some_gang(GangAbortedError("a peer was silent"))
            case "fault":
                self.fail_some_gang(ValueError("a fault"))
            case "poison" if self.life.requests:  # its next window cannot draw a token of it
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
        """A file vanishes from a disk."""
        files = [(worker, name) for worker, names in self.disks.items() for name in names]
        if files:
            worker, name = self.rng.choice(files)
            del self.disks[worker][name]

    def move_something(self) -> None:
        """Move random blocks of a random sequence, if that is possible just now."""
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
        """Run one task or answer one retirement; False when there is nothing to do."""
        self.chunks = [chain for chain in self.chunks if chain]
        busy = [home for home, queue in self.windows.items() if queue and home in self.pools]
        choices = [*self.chunks, *busy, *self.retirements, *self.moves, *self.files]
        if not choices:
            return False
        match choice := self.rng.choice(choices):
            case str():
                self.run_window(self.windows[choice][0])
            case to.Expect() | to.Send() | to.Relocate():
                self.moves.remove(choice)
                self.go_on(choice)
            case to.Store() | to.Fetch():
                self.files.remove(choice)
                self.use_disk(choice)
            case list():
                self.run_chunk(choice[0])
            case tuple():
                self.retirements.remove(choice)
                self.handle(did.Retired(*choice))
        return True

    def run_chunk(self, chunk: PrefillChunk) -> None:
        sequence, gang = chunk.sequence, chunk.gang
        self.handle(did.ChunkStarted(gang.home, gang.number))
        assert sequence in self.pools[gang.home], "computed into blocks that are not its own"
        last = chunk.start + len(chunk.tokens)
        for span in chunk.placement:
            if span.worker != gang.home and span.start < last:
                assert (gang.number, span.worker) in self.attending
        self.store(sequence, chunk.placement, chunk.start, last)
        for chain in self.chunks:
            if chain and chain[0] is chunk:
                chain.pop(0)
        if chunk.sampling is None:
            self.handle(did.ChunkDone(gang.home, sequence, gang.number, Exchanged()))
        else:
            reason: FinishReason | None = "length" if chunk.sampling.max_new_tokens == 1 else None
            self.handle(did.Prefilled(gang.home, sequence, gang.number, token(sequence, 0), reason, Exchanged()))

    def run_window(self, window: DecodeWindow) -> None:
        home = window.gang.home
        self.handle(did.WindowStarted(home, window.window))
        batch = dict(self.batches[home])
        tokens: dict[int, list[int]] = {}
        finished: dict[int, FinishReason] = {}
        errors: dict[int, DistKVError] = {}
        for sequence, (length, last, remaining) in batch.items():
            assert sequence in self.pools[home]
            placement = self.placements[sequence]
            for span in placement:
                if span.worker != home and span.tokens:
                    assert (window.gang.number, span.worker) in self.attending, "a holder was not asked to attend"
            index = last - sequence * 1000 + 1
            tokens[sequence] = []
            for _ in range(min(remaining, self.rng.randint(1, 6))):
                if index % EOS_EVERY == 0:
                    finished[sequence] = "stop"
                    break
                tokens[sequence].append(token(sequence, index))
                self.store(sequence, placement, length, length + 1, tokens[sequence])
                length, remaining, index = length + 1, remaining - 1, index + 1
            if not remaining:
                finished[sequence] = "length"
            if sequence in finished:
                del self.batches[home][sequence]
            elif sequence in self.poisoned:
                finished[sequence], errors[sequence] = "error", InvalidRequestError(f"{sequence} is to blame")
                del self.batches[home][sequence]
            else:
                self.batches[home][sequence] = (length, tokens[sequence][-1], remaining)
        self.windows[home].remove(window)
        result = WindowResult(tokens, finished, 1, self.step_seconds, errors=errors)
        self.handle(did.WindowDone(home, window.window, self.epochs[home], result, ()))

    def fail_some_gang(self, error: Exception) -> None:
        gangs = [queue[0].gang for queue in self.windows.values() if queue]
        gangs += [chain[0].gang for chain in self.chunks if chain]
        if gangs:
            failed = self.rng.choice(gangs)
            self.handle(did.GangFailed(failed.home, failed.number, error))


def assert_nothing_left(cluster: Simulated) -> None:
    """No request, and no block but cached ones; those go when the engine closes."""
    life = cluster.life
    assert not life.requests
    assert not life.ledger.sequences
    for worker, account in life.ledger.workers.items():
        assert account.used == 0
        assert sum(map(len, cluster.pools[worker].values())) == account.cached
    assert not any(cluster.disks.values())
    assert not life.disks.used
    cluster.handle(StopAll())
    assert len(life.cache) == 0
    assert not any(cluster.pools.values())


def cluster_of(seed: int, *capacities: int, **config: float) -> Simulated:
    settings = {"block_tokens": BLOCK, "prefill_chunk_tokens": 8, "window_batch": 4, "spill": 1500} | config
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
    """Finish, and end what waits for workers that do not come."""
    for wait in (0.0, *[1e6] * 6):  # what comes back to waiting is seen to be stuck one round later, and so on
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
