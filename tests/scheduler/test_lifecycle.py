"""The lifecycle driven by a simulated cluster that does things in any order, loses workers and fails gangs."""

from __future__ import annotations

import itertools
import random
from array import array
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distkv_dask.config import Config
from distkv_dask.errors import CapacityError, DistKVError, GangAbortedError, InvalidRequestError, WorkerLostError
from distkv_dask.protocol import Delivery, SavedFile
from distkv_dask.scheduler import commands as do
from distkv_dask.scheduler.lifecycle.losses import MAX_LOSSES
from distkv_dask.scheduler.lifecycle.machine import Lifecycle
from distkv_dask.types import (
    DecodeWindow,
    Endpoint,
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

    life: Lifecycle
    rng: random.Random
    pools: dict[str, dict[int, dict[int, tuple[int, ...]]]] = field(default_factory=dict)
    placements: dict[int, Placement] = field(default_factory=dict)
    moves: list[do.Expect | do.Send | do.Relocate] = field(default_factory=list)
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
    files: list[do.Store | do.Fetch] = field(default_factory=list)
    poisoned: set[int] = field(default_factory=set)
    now: float = 0.0
    allocated: set[int] = field(default_factory=set)
    step_seconds: float = 0.05
    lengths: list[float] = field(default_factory=list)

    def run(self, commands: object) -> None:
        for command in commands:  # type: ignore[attr-defined]
            self.enact(command)
        self.life.ledger.check()
        for worker, account in self.life.ledger.workers.items():
            assert sum(map(len, self.pools[worker].values())) <= account.used + account.cached
        self.now += 0.01

    def enact(self, command: do.Command) -> None:
        match command:
            case do.Reserve(worker, sequence, start, stop):
                self.reserve(worker, sequence, start, stop)
            case do.Release(worker, sequence):
                assert (worker, sequence) not in self.retirements
                self.pools[worker].pop(sequence, None)  # nothing is there of a move that has only begun
            case do.Retire(worker, sequence):
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
            case do.Join(home, state, _):
                assert (
                    state.length
                    == len(self.life.live[state.sequence].prompt) + len(self.life.live[state.sequence].generated) - 1
                )
                self.batches[home][state.sequence] = (state.length, state.last_token, state.remaining)
                self.placements[state.sequence] = state.placement
            case do.Expect() | do.Send() | do.Relocate():
                self.moves.append(command)
                if isinstance(command, do.Expect) and not (self.refusing and self.rng.random() < 0.3):
                    # at once: what is sent to one worker arrives in order, so before a FREE or RELEASE of it
                    self.reserve(command.worker, command.sequence, command.start, command.stop)
                    self.allocated.add(command.number)
                if isinstance(command, do.Relocate):
                    assert command.sequence in self.batches[command.home]
                    self.placements[command.sequence] = command.placement
            case do.Free(worker, sequence, start, stop):
                if worker in self.pools:
                    for block in blocks(start, stop):
                        self.pools[worker].get(sequence, {}).pop(block, None)
                    if not self.pools[worker].get(sequence, True):
                        del self.pools[worker][sequence]
            case do.Store(worker, _, sequence):
                assert (worker, sequence) not in self.retirements
                assert sequence not in self.batches[worker]
                self.files.append(command)
            case do.Fetch():
                self.files.append(command)
            case do.Discard(worker, names):
                for name in names:
                    self.disks.get(worker, {}).pop(name, None)
            case do.Reset(home, epoch):
                self.batches[home].clear()
                self.epochs[home] = epoch
            case do.Abort(worker, gang, _, _):
                assert worker in self.pools
                self.attending.discard((gang, worker))
            case do.Forget(gang, finished):
                if not finished:
                    for chain in self.chunks:
                        chain[:] = [chunk for chunk in chain if chunk.gang.number != gang.number]
                    self.windows[gang.home] = [w for w in self.windows[gang.home] if w.gang.number != gang.number]
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
        live = self.life.live[sequence]
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

    def go_on(self, message: do.Expect | do.Send | do.Relocate) -> None:
        """A worker works on one message of a move, and answers."""
        life = self.life
        match message:
            case do.Expect(worker, number):
                if worker not in self.pools:
                    return
                self.run(life.move_expected(number, "" if number in self.allocated else "no room", self.now))
            case do.Send(worker, number, sequence, start, stop, target, _):
                if worker not in self.pools:
                    return
                tables = [self.pools.get(one, {}).get(sequence, {}) for one in (worker, target)]
                wanted = set(blocks(start, stop))
                failure = "not expected any more" if not all(wanted <= {*table} for table in tables) else ""
                if not failure:
                    tables[1].update({block: tables[0][block] for block in wanted})
                self.run(life.move_sent(number, failure, self.now))
            case do.Relocate(home, number):
                if home in self.pools:
                    self.run(life.relocated(number, self.now))

    def use_disk(self, message: do.Store | do.Fetch) -> None:
        """A worker writes blocks to its disk, or fills them from its own and others' disks."""
        worker, life = message.worker, self.life
        if worker not in self.pools:
            return
        table, failure = self.pools[worker].get(message.sequence, {}), None
        if isinstance(message, do.Store):
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
            self.run(life.saved(message.number, worker, tuple(files), failure, self.now))
            return
        for start, stop in message.ranges:
            for block in blocks(start, stop):
                held = [file for file in message.saved.files if block in blocks(file.start, file.stop)]
                if not held or held[0].name not in self.disks.get(held[0].worker, {}):
                    failure = OSError("not on any disk")
                    continue
                assert block in table, "read into somebody else's blocks"
                table[block] = self.disks[held[0].worker][held[0].name][block]
        self.run(life.fetched(message.sequence, worker, failure, self.now))

    def attend(self, gang: Gang, holders: tuple[Endpoint, ...]) -> None:
        for holder in holders:
            assert holder.worker in self.pools
            assert holder.worker != gang.home
            self.attending.add((gang.number, holder.worker))

    # What may happen next

    def add_worker(self, capacity: int) -> None:
        worker = f"w{next(self.names)}"
        self.pools[worker], self.batches[worker], self.epochs[worker] = {}, {}, 0
        self.disks[worker] = {}
        endpoint = Endpoint(worker, "127.0.0.1", 1)
        self.run(self.life.worker_ready(endpoint, capacity, self.now, spill_bytes=self.life.config.spill))

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
            self.run(self.life.worker_lost(worker, self.now))

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
            case "poison" if self.life.live:  # its next window cannot draw a token of it
                self.poisoned.add(self.rng.choice(sorted(self.life.live)))
            case "move":
                self.move_something()
            case "drain" | "stay":
                self.run(self.life.drain(self.rng.choice(sorted(self.pools)), mishap == "drain", self.now))
            case "rot":
                self.lose_file()
            case "stall":  # no worker begins anything
                for wait in (0, self.life.config.timeout_start + 1):
                    self.run(self.life.expire(self.now + wait))
            case "late":
                self.run(self.life.expire(self.now + self.life.config.timeout_receive + 1))
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
        ledger, moving = self.life.ledger, self.life.moving
        numbers = [number for number in ledger.sequences if self.life.live[number].state in ("decode", "document")]
        if not numbers:
            return
        number = self.rng.choice(numbers)
        span = self.rng.choice(ledger.sequences[number].placement)
        full = (min(span.stop, moving.full_tokens(number)) - span.start) // BLOCK
        if full > 0:
            first = self.rng.randrange(full)
            stop = span.start + self.rng.randint(first + 1, full) * BLOCK
            move = Move(number, span.start + first * BLOCK, stop, span.worker, self.rng.choice(sorted(self.pools)))
            if moving.can_start(move):
                self.run(moving.start(move, self.now))

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
            case do.Expect() | do.Send() | do.Relocate():
                self.moves.remove(choice)
                self.go_on(choice)
            case do.Store() | do.Fetch():
                self.files.remove(choice)
                self.use_disk(choice)
            case list():
                self.run_chunk(choice[0])
            case tuple():
                self.retirements.remove(choice)
                self.run(self.life.retired(choice[1], choice[0], self.now))
        return True

    def run_chunk(self, chunk: PrefillChunk) -> None:
        sequence, gang = chunk.sequence, chunk.gang
        self.life.chunk_started(gang.number)
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
            self.run(self.life.chunk_done(sequence, gang.number, self.now))
        else:
            reason: FinishReason | None = "length" if chunk.sampling.max_new_tokens == 1 else None
            self.run(self.life.prefilled(sequence, gang.number, token(sequence, 0), reason, self.now))

    def run_window(self, window: DecodeWindow) -> None:
        home = window.gang.home
        self.run(self.life.window_started(home, window.window))
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
        self.run(
            self.life.window_done(
                home,
                window.window,
                self.epochs[home],
                WindowResult(tokens, finished, 1, self.step_seconds, errors=errors),
                (),
                self.now,
            )
        )

    def fail_some_gang(self, error: Exception) -> None:
        gangs = [queue[0].gang for queue in self.windows.values() if queue]
        gangs += [chain[0].gang for chain in self.chunks if chain]
        if gangs:
            self.run(self.life.gang_failed(self.rng.choice(gangs).number, error, self.now))


def assert_nothing_left(cluster: Simulated) -> None:
    """No request, and no block but cached ones; those go when the engine closes."""
    life = cluster.life
    assert not life.live
    assert not life.ledger.sequences
    for worker, account in life.ledger.workers.items():
        assert account.used == 0
        assert sum(map(len, cluster.pools[worker].values())) == account.cached
    assert not any(cluster.disks.values())
    assert not life.spilling.used
    cluster.run(life.stop_all(cluster.now))
    assert len(life.cache) == 0
    assert not any(cluster.pools.values())


def cluster_of(seed: int, *capacities: int, **config: float) -> Simulated:
    settings = {"block_tokens": BLOCK, "prefill_chunk_tokens": 8, "window_batch": 4, "spill": 1500} | config
    life = Lifecycle("engine", Config.load(**settings), itertools.count(1), block_bytes=100)
    simulated = Simulated(life, random.Random(seed))
    for capacity in capacities:
        simulated.add_worker(capacity)
    return simulated


def expected(sequence: int, new: int) -> list[int]:
    return [token(sequence, index) for index in range(min(new, EOS_EVERY))]


requests = st.lists(st.tuples(st.integers(1, 60), st.integers(1, 40), st.integers(0, 2)), min_size=1, max_size=12)
mishaps = st.lists(
    st.sampled_from(
        ["lose", "join", "fail", "fault", "poison", "cancel", "drain", "stay", "stall", "late", "rot"]
        + ["move"] * 3
        + ["step"] * 6
    ),
    max_size=80,
)


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32), st.lists(st.integers(8, 20), min_size=1, max_size=4), requests, mishaps)
def test_every_request_ends_once_with_right_tokens_and_nothing_is_left(
    seed: int, sizes: list[int], wanted: list[tuple[int, int, int]], events: list[str]
) -> None:
    cluster, accepted = cluster_of(seed, *sizes), []
    cluster.refusing = True
    life = cluster.life
    for number, (prompt, new, priority) in enumerate(wanted):
        for _ in range(cluster.rng.randint(0, 3)):
            cluster.step()
        try:
            sampling = SamplingParams(max_new_tokens=new, priority=priority)
            cluster.run(life.submit(number, array("i", range(prompt)), sampling, cluster.now))
            accepted.append(number)
        except CapacityError:
            pass
    cancelled = set()
    for event in events:
        if event == "cancel" and life.live:
            number = cluster.rng.choice(sorted(life.live))
            if number not in cluster.ends:
                cancelled.add(number)
            cluster.run(life.stop(number, "cancelled", cluster.now))
        else:
            cluster.happen(event)
    for worker in list(cluster.pools):
        cluster.run(life.drain(worker, False, cluster.now))
    settle(cluster)
    assert set(cluster.ends) == set(accepted)
    for number in accepted:
        reason, error = cluster.ends[number]
        right = expected(number, wanted[number][1])
        assert cluster.tokens[number] == right[: len(cluster.tokens[number])], "tokens lost, doubled or out of order"
        if reason in ("stop", "length"):
            assert cluster.tokens[number] == right
            assert reason == ("length" if wanted[number][1] <= EOS_EVERY else "stop")
        assert (reason == "error") == (error is not None)
        assert not isinstance(error, WorkerLostError) or events.count("lose") > MAX_LOSSES
        assert (reason == "cancelled") == (number in cancelled)
        if isinstance(error, InvalidRequestError):
            assert number in cluster.poisoned
            assert str(error) == f"{number} is to blame"
    assert_nothing_left(cluster)


def finish(cluster: Simulated) -> None:
    for _ in range(5000):
        if not cluster.step():
            return
    raise AssertionError(f"it goes on for ever: {cluster.life.live}")


def settle(cluster: Simulated) -> None:
    """Finish, and end what waits for workers that do not come."""
    for wait in (0.0, *[1e6] * 6):  # what comes back to waiting is seen to be stuck one round later, and so on
        cluster.now += wait
        cluster.run(cluster.life.expire(cluster.now))
        finish(cluster)


def test_a_burst_larger_than_the_cluster_finishes_in_turn() -> None:
    cluster = cluster_of(1, 10, 10)
    for number in range(20):
        cluster.run(cluster.life.submit(number, array("i", range(50)), SamplingParams(max_new_tokens=9), 0.0))
    finish(cluster)
    assert list(cluster.ends) == sorted(cluster.ends)
    assert len(cluster.ends) == 20
    assert all(reason == "length" for reason, _ in cluster.ends.values())


def test_what_can_never_fit_is_refused_with_needed_and_available_bytes_and_the_setting() -> None:
    cluster = cluster_of(1, 10, 10)
    with pytest.raises(CapacityError, match=r"needs 2100 bytes.*have 2000 bytes.*distkv\.kv-memory"):
        cluster.life.submit(0, array("i", range(80)), SamplingParams(max_new_tokens=2), 0.0)


def decoding(cluster: Simulated) -> None:
    """Run until every request decodes."""
    while not all(live.state == "decode" and len(live.generated) > 1 for live in cluster.life.live.values()):
        assert cluster.step()


def test_requests_with_blocks_on_a_lost_worker_are_computed_anew_and_go_on_where_they_were() -> None:
    cluster = cluster_of(3, 12, 12)
    for number in range(2):  # one on each worker
        cluster.run(cluster.life.submit(number, array("i", range(20)), SamplingParams(max_new_tokens=20), 0.0))
    decoding(cluster)
    told = len(cluster.tokens[0])
    cluster.lose_worker(cluster.life.ledger.sequences[0].home)
    assert cluster.life.live[0].state == "waiting", "the other worker has no room beside its own request"
    finish(cluster)
    assert cluster.tokens == {number: expected(number, 20) for number in range(2)}
    assert cluster.ends == {1: ("length", None), 0: ("length", None)}
    assert 1 < told < 20


@pytest.mark.parametrize("part", [0, -1], ids=["holder", "home"])
def test_a_request_that_loses_its_holder_or_home_waits_for_a_replacement(part: int) -> None:
    cluster = cluster_of(3, 8, 8)
    cluster.run(cluster.life.submit(0, array("i", range(40)), SamplingParams(max_new_tokens=16), 0.0))
    decoding(cluster)
    cluster.lose_worker(cluster.life.ledger.sequences[0].placement[part].worker)
    finish(cluster)
    assert not cluster.ends
    cluster.add_worker(8)
    finish(cluster)
    assert cluster.ends == {0: ("length", None)}
    assert cluster.tokens[0] == expected(0, 16)


def test_without_a_replacement_the_request_fails_and_says_which_worker_it_lost() -> None:
    cluster = cluster_of(3, 8, 8)
    cluster.run(cluster.life.submit(0, array("i", range(40)), SamplingParams(max_new_tokens=16), 0.0))
    decoding(cluster)
    lost = cluster.life.ledger.sequences[0].home
    cluster.lose_worker(lost)
    finish(cluster)
    cluster.run(cluster.life.expire(cluster.now))
    cluster.run(cluster.life.expire(cluster.now + cluster.life.config.timeout_open + 1))
    reason, error = cluster.ends[0]
    assert reason == "error"
    assert isinstance(error, CapacityError)
    assert f"lost blocks with worker {lost}" in str(error)


def test_a_request_that_loses_one_worker_after_the_other_fails_in_the_end() -> None:
    cluster = cluster_of(3, 16)
    cluster.run(cluster.life.submit(0, array("i", range(20)), SamplingParams(max_new_tokens=22), 0.0))
    for loss in range(MAX_LOSSES + 1):
        assert 0 not in cluster.ends, f"after {loss} losses"
        cluster.add_worker(16)
        decoding(cluster)
        cluster.lose_worker(cluster.life.ledger.sequences[0].home)
    reason, error = cluster.ends[0]
    assert reason == "error"
    assert isinstance(error, WorkerLostError)
    assert f"{MAX_LOSSES + 1} workers died" in str(error)
    assert cluster.tokens[0] == expected(0, 22)[: len(cluster.tokens[0])]


def test_a_request_can_be_cancelled_while_the_rest_of_it_retires_to_be_computed_anew() -> None:
    cluster = cluster_of(3, 8, 8, 8)
    cluster.run(cluster.life.submit(0, array("i", range(40)), SamplingParams(max_new_tokens=16), 0.0))
    decoding(cluster)
    cluster.lose_worker(cluster.life.ledger.sequences[0].home)
    assert cluster.life.live[0].state == "retiring"
    cluster.run(cluster.life.stop(0, "cancelled", cluster.now))
    assert cluster.ends == {0: ("cancelled", None)}
    finish(cluster)
    assert_nothing_left(cluster)


def keep_failing(cluster: Simulated, seconds: float) -> int:
    """Fail every gang for a while, in which the clock goes on; how many there were."""
    failed, until = 0, cluster.now + seconds
    while cluster.now < until:
        while any(cluster.windows.values()) or any(cluster.chunks):
            cluster.fail_some_gang(GangAbortedError("a peer was silent"))
            failed += 1
        cluster.now += 0.5
        cluster.run(cluster.life.expire(cluster.now))
    return failed


@pytest.mark.parametrize("state", ["prefill", "decode"])
def test_a_request_survives_a_network_that_is_cut_for_less_than_a_peer_may_be_silent(state: str) -> None:
    cluster = cluster_of(4, 8, 8)
    cluster.run(cluster.life.submit(0, array("i", range(40)), SamplingParams(max_new_tokens=16), 0.0))
    if state == "decode":
        decoding(cluster)
    failed = keep_failing(cluster, cluster.life.config.timeout_receive - 2)
    assert cluster.life.live[0].state == state
    assert 10 < failed < 40, "it is tried all the time, and with pauses"
    finish(cluster)
    settle(cluster)
    assert cluster.ends == {0: ("length", None)}
    assert cluster.tokens[0] == expected(0, 16)
    assert_nothing_left(cluster)


@pytest.mark.parametrize("state", ["prefill", "decode"])
def test_a_gang_that_keeps_failing_fails_its_requests_and_not_for_ever(state: str) -> None:
    cluster = cluster_of(4, 8, 8)
    cluster.run(cluster.life.submit(0, array("i", range(40)), SamplingParams(max_new_tokens=16), 0.0))
    if state == "decode":
        decoding(cluster)
    keep_failing(cluster, cluster.life.config.timeout_receive + 3)
    assert cluster.ends[0][0] == "error"
    assert "silent" in str(cluster.ends[0][1])
    finish(cluster)
    assert_nothing_left(cluster)


def test_a_holder_that_cannot_be_reached_does_not_fail_requests_that_do_without_it() -> None:
    cluster = cluster_of(4, 30, 8)
    cluster.run(cluster.life.submit(0, array("i", range(40)), SamplingParams(max_new_tokens=20), 0.0))
    decoding(cluster)
    home = cluster.life.ledger.sequences[0].home
    (holder,) = cluster.pools.keys() - {home}
    cluster.run(cluster.life.moving.start(Move(0, 0, 4 * BLOCK, home, holder), cluster.now))
    while len(cluster.life.ledger.sequences[0].placement) < 2:
        cluster.step()
    assert decode(cluster, 1, 6) == home
    while 0 not in cluster.ends:
        keep_failing(cluster, 1)
    assert cluster.ends.keys() == {0}
    finish(cluster)
    assert cluster.ends[1] == ("length", None)
    assert cluster.tokens[1] == expected(1, 6)


def test_a_request_that_rests_can_be_cancelled_or_lose_a_worker() -> None:
    cluster = cluster_of(4, 12, 12, 12)
    for number in range(2):
        cluster.run(cluster.life.submit(number, array("i", range(40)), SamplingParams(max_new_tokens=16), 0.0))
    keep_failing(cluster, 5)
    while any(cluster.chunks):
        cluster.fail_some_gang(GangAbortedError("a peer was silent"))
    assert not any(live.chunks for live in cluster.life.live.values()), "both rest"
    cluster.run(cluster.life.stop(0, "cancelled", cluster.now))
    cluster.lose_worker(cluster.life.ledger.sequences[1].home)
    settle(cluster)
    assert cluster.ends == {0: ("cancelled", None), 1: ("length", None)}
    assert cluster.tokens[1] == expected(1, 16)
    assert_nothing_left(cluster)


def decode(cluster: Simulated, number: int, tokens: int, streamed: bool = False) -> str:
    """A request for so many tokens whose prompt is done; its home."""
    sampling = SamplingParams(max_new_tokens=tokens)
    cluster.run(cluster.life.submit(number, array("i", range(8)), sampling, 0.0, streamed))
    while cluster.chunks:
        cluster.run_chunk(cluster.chunks[0][0])
        cluster.chunks = [chain for chain in cluster.chunks if chain]
    return cluster.life.ledger.sequences[number].home


def test_a_request_that_joins_waits_for_one_window_at_most() -> None:
    cluster = cluster_of(5, 100)
    home = decode(cluster, 0, 40)
    running = cluster.windows[home][0]
    cluster.run(cluster.life.window_started(home, running.window))
    assert len(cluster.windows[home]) == 2, "the next window waits at the home already"
    decode(cluster, 1, 40)  # another one, whose prompt is done while the window runs
    assert len(cluster.windows[home]) == 2, "no third window, which it would have to wait for"
    cluster.windows[home].remove(running)
    nothing = WindowResult({}, {}, 0, 0)
    cluster.run(cluster.life.window_done(home, running.window, 0, nothing, (), cluster.now))
    cluster.run_window(cluster.windows[home][0])
    assert len(cluster.tokens[1]) > 1, "the window that was queued before it joined took it along"


def test_no_window_is_queued_behind_one_that_ends_every_sequence() -> None:
    cluster = cluster_of(6, 100, window_seconds=1, window_stream_seconds=1)
    home = decode(cluster, 0, 20)  # 1 s has 20 steps of 50 ms
    cluster.run_window(cluster.windows[home][0])  # tells how long a step takes
    running = cluster.windows[home][0]
    assert cluster.life.live[0].remaining <= 16
    cluster.run(cluster.life.window_started(home, running.window))
    assert cluster.windows[home] == [running]
    decode(cluster, 1, 20)
    assert len(cluster.windows[home]) == 2, "but one that joins meanwhile has its next window"


@pytest.mark.parametrize("steps", [3, 16])
def test_a_limit_of_steps_is_counted_in_what_a_window_can_end(steps: int) -> None:
    cluster = cluster_of(6, 100, window_seconds=1, window_stream_seconds=1, window_steps=steps)
    home = decode(cluster, 0, 20)
    cluster.run_window(cluster.windows[home][0])
    cluster.run(cluster.life.window_started(home, cluster.windows[home][0].window))
    assert len(cluster.windows[home]) == (2 if steps == 3 else 1)


def test_windows_are_short_only_while_somebody_reads_along_or_waits() -> None:
    lengths = {"window_seconds": 2, "window_stream_seconds": 0.25}
    unwatched = cluster_of(7, 100, **lengths)
    home = decode(unwatched, 0, 200)
    assert unwatched.windows[home][0].seconds == 2
    sampling = SamplingParams(max_new_tokens=4)
    unwatched.run(unwatched.life.submit(1, array("i", range(20)), sampling, 0.0))  # its prompt waits for the lane
    unwatched.run_window(unwatched.windows[home][0])
    assert unwatched.windows[home][-1].seconds == 0.25
    streamed = cluster_of(7, 100, **lengths)
    assert streamed.windows[decode(streamed, 0, 200, streamed=True)][0].seconds == 0.25


def test_windows_grow_with_the_number_of_homes_and_holders_but_end_before_holders_give_up() -> None:
    def longest(workers: int, **settings: float) -> float:
        cluster = cluster_of(8, *[10] * workers, **settings)
        for number in range(workers // 2):  # each takes more than one worker has
            cluster.run(cluster.life.submit(number, array("i", range(40)), SamplingParams(max_new_tokens=20), 0.0))
        finish(cluster)
        return max(cluster.lengths)

    lengths = {"window_seconds": 0.25, "window_scheduler_share": 0.2}
    assert longest(4, **lengths) == 0.25
    assert longest(8, **lengths) < longest(60, **lengths) <= 10
    assert longest(60, timeout_start=0.6, **lengths) == 0.3


def test_a_worker_that_leaves_is_emptied_while_its_requests_go_on() -> None:
    cluster = cluster_of(5, 12, 12, 12)
    for number in range(4):
        cluster.run(cluster.life.submit(number, array("i", range(20)), SamplingParams(max_new_tokens=15), 0.0))
    while not all(live.state == "decode" for live in cluster.life.live.values()):
        cluster.step()
    leaving = cluster.life.ledger.sequences[0].home
    cluster.run(cluster.life.drain(leaving, True, 0.0))
    while not cluster.life.is_drained(leaving):
        assert cluster.step()
    cluster.pools.pop(leaving), cluster.batches.pop(leaving), cluster.windows.pop(leaving, None)
    cluster.run(cluster.life.worker_lost(leaving, 0.0))
    finish(cluster)
    assert all(cluster.tokens[number] == expected(number, 15) for number in range(4))
    assert all(reason == "length" for reason, _ in cluster.ends.values())
