"""Models with recurrent layers in the state machine: no sequence continues without its state, whatever happens."""

from __future__ import annotations

import itertools
import random
from array import array
from collections import defaultdict

import pytest
from _examples import examples
from _simulated import BLOCK, Simulated, assert_nothing_left, expected, finish, mishaps, settle
from hypothesis import given, settings
from hypothesis import strategies as st
from test_document_life import assert_right_ends, events, happen, ingest_all, prompt

from distkv_dask.config import Config
from distkv_dask.errors import CapacityError, StateLostError
from distkv_dask.gang import DecodeWindow, PrefillChunk
from distkv_dask.messages import from_worker as did
from distkv_dask.messages import to_worker as to
from distkv_dask.messages.names import Saved
from distkv_dask.sampling import SamplingParams
from distkv_dask.scheduler import commands as do
from distkv_dask.scheduler.lifecycle.machine import Lifecycle
from distkv_dask.scheduler.records.machine_state import MachineState
from distkv_dask.scheduler.records.states import Decode
from distkv_dask.simulate.workers import Asked
from distkv_dask.worker.home.states import States


class Stateful(Simulated):
    """Workers that keep states like homes, and fail like homes if one is missing."""

    def __init__(self, machine: Lifecycle, rng: random.Random) -> None:
        super().__init__(machine, rng)
        self.states: dict[str, States] = defaultdict(States)
        self.computed = 0
        self.missing = 0

    def enact(self, command: do.Command) -> None:
        super().enact(command)
        match command:
            case to.Release(worker, sequence):
                self.states[worker].drop(sequence)
            case to.Begin(worker, sequence, source, length):
                self.states[worker].adopt(sequence, source, length)
            case to.Keep(worker, sequence, lengths, ended):
                self.states[worker].keep(sequence, lengths, ended)

    def remove(self, worker: str) -> None:
        super().remove(worker)
        self.states.pop(worker, None)

    def run_chunk(self, chunk: PrefillChunk) -> None:
        states, stop = self.states[chunk.gang.home], chunk.start + len(chunk.tokens)
        try:
            states.begin_run(chunk.sequence, chunk.start)
        except StateLostError as error:
            self._fail(chunk.gang.home, chunk.gang.number, error)
            return
        self.computed += len(chunk.tokens)
        states.put(chunk.sequence, stop, {})
        if chunk.snapshot:
            states.snapshot(chunk.sequence, stop)
        super().run_chunk(chunk)

    def run_window(self, window: DecodeWindow) -> None:
        home = window.gang.home
        batch, states = self.batches[home], self.states[home]
        try:
            for number, entry in batch.items():
                states.begin_run(number, entry.length)
        except StateLostError as error:
            self.handle(did.WindowStarted(home, window.window))
            self._fail(home, window.gang.number, error)
            return
        super().run_window(window)
        for number, entry in self.batches.get(home, {}).items():
            states.put(number, entry.length, {})

    def go_on(self, message: Asked) -> None:
        """A home has a state again once it has read it."""
        if isinstance(message, to.Fetch) and message.home:
            self.states[message.worker].put(message.sequence, message.home, {})
        if isinstance(message, to.Store) and message.home and message.worker in self.pools:
            try:
                self.states[message.worker].kept(message.sequence, message.home)
            except StateLostError as error:
                kind, number = message.transfer
                self.missing += kind == "save" or number in self.life.disks.numbers  # else it was given up
                self.handle(did.Stored(message.worker, message.transfer, (), error))
                return
        super().go_on(message)

    def check(self) -> None:
        """Check that homes keep no more than their places, and exactly the snapshots that the gManager knows."""
        super().check()
        snapshots = self.life.snapshots
        for worker, account in self.life.ledger.workers.items():
            assert len(snapshots.recent[worker]) <= max(0, account.places - account.homed)
            assert self.states[worker].sequences() <= {*self.life.ledger.sequences, *snapshots.of}

    def forget(self) -> None:
        """A home loses the states of a sequence."""
        if self.life.ledger.sequences:
            number = self.rng.choice(sorted(self.life.ledger.sequences))
            self.states[self.life.ledger.sequences[number].home].drop(number)

    def _fail(self, home: str, gang: int, error: StateLostError) -> None:
        self.missing += 1
        self.handle(did.GangFailed(home, gang, error))


def stateful(seed: int, *capacities: int) -> Stateful:
    config = Config.load(block_tokens=BLOCK, prefill_chunk_tokens=8, window_batch=4, spill=1500)
    cluster = Stateful(
        Lifecycle(MachineState("engine", config, itertools.count(1), block_bytes=100)), random.Random(seed)
    )
    cluster.life.keep_states(100)
    for capacity in capacities:
        cluster.add_worker(capacity)
    return cluster


def ask(cluster: Stateful, number: int, asked: array[int], new: int = 9, **how: object) -> None:
    cluster.submit(number, asked, SamplingParams(max_new_tokens=new), **how)


def test_a_prompt_on_three_workers_is_computed_by_its_home_alone() -> None:
    cluster = stateful(0, 6, 6, 6)
    ask(cluster, 0, prompt(0, 50))
    assert len({chunk.gang.home for chunk in cluster.chunks[0]}) == 1
    assert len({span.worker for span in cluster.chunks[0][0].placement}) == 3
    finish(cluster)
    assert cluster.tokens[0] == expected(0, 9)
    assert cluster.missing == 0


@pytest.mark.parametrize("lost", [0, 1])
def test_a_sequence_that_lost_blocks_goes_on_from_the_last_snapshot_before_them(lost: int) -> None:
    cluster = stateful(0, 6, 6, 6)
    ask(cluster, 0, prompt(0, 50), 20)
    while not cluster.life.ledger.sequences[0].length > 50:
        cluster.step()
    account, before = cluster.life.ledger.sequences[0], cluster.computed
    generated, kept = cluster.life.requests[0].known_tokens - 50, [*cluster.life.snapshots.of[0]]
    span = account.placement[lost]
    cluster.add_worker(12)
    cluster.lose_worker(span.worker)
    finish(cluster)
    assert cluster.tokens[0] == expected(0, 20)
    begins = max((at for at in kept if at <= span.start), default=0)
    assert cluster.computed == before + 50 + generated - begins
    assert bool(begins) == bool(lost)
    assert cluster.missing == 0


def test_a_sequence_whose_home_is_lost_is_computed_again_from_its_first_token() -> None:
    cluster = stateful(0, 14, 14)
    ask(cluster, 0, prompt(0, 30), 20)
    while not cluster.life.ledger.sequences[0].length > 30:
        cluster.step()
    before, known = cluster.computed, cluster.life.requests[0].known_tokens
    cluster.lose_worker(cluster.life.ledger.sequences[0].home)
    finish(cluster)
    assert cluster.tokens[0] == expected(0, 20)
    assert cluster.computed == before + known


def test_questions_begin_with_the_last_snapshot_of_their_document_at_its_home() -> None:
    cluster = stateful(0, 30, 30)
    cluster.ingest(0, prompt(0, 18))
    finish(cluster)
    home = cluster.life.ledger.sequences[0].home
    ask(cluster, 1, prompt(0, 18, 7), document=0)
    assert {chunk.gang.home for chain in cluster.chunks for chunk in chain} == {home}
    ask(cluster, 2, prompt(0, 12, 7), document=0)
    finish(cluster)
    assert (cluster.reused[1], cluster.reused[2]) == (16, 8)
    assert cluster.missing == 0


def test_prompts_leave_snapshots_near_their_beginning_their_end_and_where_they_part() -> None:
    cluster = stateful(0, 60)
    cluster.life.ledger.workers["w0"].places = 20
    ask(cluster, 0, prompt(0, 90))
    ends = {chunk.start + len(chunk.tokens) for chunk in cluster.chunks[0] if chunk.snapshot}
    assert ends == {8, 16, 32, 64} | {88, 80, 64, 32}
    finish(cluster)
    ask(cluster, 1, prompt(0, 50, 30))  # no snapshot between 32 and 64 is kept
    assert [chunk.start for chunk in cluster.chunks[0]][:2] == [32, 40]
    finish(cluster)
    ask(cluster, 2, prompt(0, 50, 20))
    assert cluster.chunks[0][0].start == 48
    finish(cluster)
    assert [cluster.tokens[number] for number in range(3)] == [expected(number, 9) for number in range(3)]
    assert cluster.missing == 0


def test_a_snapshot_goes_with_its_blocks_and_before_others_that_were_used() -> None:
    cluster = stateful(0, 60)
    for number in range(3):
        ask(cluster, number, prompt(number, 20))
        finish(cluster)
    assert {number for number, _ in cluster.life.snapshots.recent["w0"]} == {1, 2}  # of four places, each takes two
    for number, text in ((3, 1), (4, 4)):
        ask(cluster, number, prompt(text, 20))
        finish(cluster)
    assert {number for number, _ in cluster.life.snapshots.recent["w0"]} == {1, 4}
    ask(cluster, 5, prompt(5, 210), 30)
    assert not cluster.life.cache.by_number
    assert cluster.life.snapshots.of.keys() == {5}
    finish(cluster)
    assert cluster.missing == 0


def test_documents_take_places_and_give_them_up_to_requests() -> None:
    cluster = stateful(0, 60)
    for number in range(4):
        cluster.ingest(number, prompt(number, 18))
    finish(cluster)
    ask(cluster, 10, prompt(9, 20))
    finish(cluster)
    assert cluster.tokens[10] == expected(10, 9)
    assert sum(one.state.label == "dropped" for one in cluster.life.requests.values()) == 1


def test_a_home_that_leaves_hands_its_sequences_over_with_their_states() -> None:
    cluster = stateful(0, 20, 20)
    cluster.ingest(0, prompt(0, 18))
    ask(cluster, 1, prompt(1, 18), 20)
    finish_until = lambda: cluster.life.requests[1].generated and cluster.life.requests[0].is_announced  # noqa: E731
    while not finish_until():
        cluster.step()
    leaving = cluster.life.ledger.sequences[1].home
    before = cluster.computed
    cluster.drain(leaving)
    finish(cluster)
    assert cluster.life.is_drained(leaving)
    assert cluster.tokens[1] == expected(1, 20)
    ask(cluster, 2, prompt(0, 18, 7), document=0)
    finish(cluster)
    assert (cluster.reused[2], cluster.computed - before) == (16, 3)
    assert cluster.missing == 0


def test_homes_write_and_read_states_with_the_blocks_of_documents() -> None:
    cluster = stateful(0, 5, 20)
    cluster.ingest(0, prompt(0, 30))
    finish(cluster)
    account = cluster.life.ledger.sequences[0]
    cluster.save(1, 0, Saved("folder"))
    stores = [one for one in cluster.files if isinstance(one, to.Store)]
    assert {one.worker: one.home for one in stores} == {
        worker: account.length * (worker == account.home) for worker in account.workers()
    }
    finish(cluster)
    files = cluster.life.requests[0].saved.files
    cluster.stop(0)
    finish(cluster)
    cluster.ingest(2, prompt(0, 30), saved=Saved("folder", files))
    ask(cluster, 3, prompt(0, 30, 7), document=2)
    before = cluster.computed
    finish(cluster)
    assert cluster.tokens[3] == expected(3, 9)
    assert (cluster.missing, cluster.computed - before) == (0, 31 - account.length)


def test_a_stopped_request_whose_state_is_lost_ends_and_others_go_on() -> None:
    cluster = stateful(0, 40)
    for number in (0, 1):
        ask(cluster, number, prompt(number, 20), 60)
    while [type(one.state) for one in cluster.life.requests.values()] != [Decode] * 2 or not cluster.windows["w0"]:
        assert cluster.step()
    (chain,) = cluster.life.chains.values()
    gang = next(chain.gangs())
    cluster.stop(0)
    cluster.handle(did.GangFailed(gang.home, gang.number, StateLostError("lost", 0)))
    finish(cluster)
    assert cluster.ends[0] == ("cancelled", None)
    assert cluster.tokens[1] == expected(1, 60)


@settings(max_examples=examples(150), deadline=None)
@given(
    st.integers(0, 2**32),
    st.lists(st.integers(8, 20), min_size=1, max_size=4),
    st.lists(st.integers(1, 50), min_size=1, max_size=4),
    st.lists(events | st.just("forget"), max_size=100),
)
def test_every_request_ends_once_with_right_tokens_and_nothing_is_left(
    seed: int, sizes: list[int], documents: list[int], happenings: list[object]
) -> None:
    cluster = stateful(seed, *sizes)
    cluster.refusing = True
    wanted: dict[int, int] = {}
    held = ingest_all(cluster, documents)
    for happening in happenings:
        if happening == "forget":
            cluster.forget()
        else:
            happen(cluster, happening, held, wanted)
    if "forget" not in happenings:
        assert cluster.missing == 0
    for worker in list(cluster.pools):
        cluster.drain(worker, False)
    settle(cluster)
    assert_right_ends(cluster, wanted, happenings)
    for number in wanted:
        _, error = cluster.ends[number]
        assert not isinstance(error, StateLostError) or happenings.count("forget") > 2
    for number in sorted(cluster.life.requests, key=lambda number: cluster.rng.random()):
        cluster.stop(number)
    settle(cluster)
    assert_nothing_left(cluster)
    assert not any(states.sequences() for states in cluster.states.values())
    assert not cluster.life.snapshots.of


@settings(max_examples=examples(100), deadline=None)
@given(st.integers(0, 2**32), st.lists(st.integers(8, 20), min_size=1, max_size=4), mishaps)
def test_no_request_fails_for_a_state_that_nobody_lost(seed: int, sizes: list[int], happenings: list[str]) -> None:
    cluster = stateful(seed, *sizes)
    for number in range(6):
        try:
            ask(cluster, number, array("i", range(5 + 7 * number)), 15)
        except CapacityError:
            continue
    for happening in happenings:
        cluster.happen(happening)
    for worker in list(cluster.pools):
        cluster.drain(worker, False)
    settle(cluster)
    assert cluster.missing == 0
    assert not any(isinstance(error, StateLostError) for _, error in cluster.ends.values())
