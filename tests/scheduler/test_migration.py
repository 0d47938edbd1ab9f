"""Moves of blocks: their speed, time limits and counters, and the effects of drains and pauses."""

from __future__ import annotations

from array import array

import pytest
from _happenings import ONE, SPARE, lose
from _simulated import BLOCK, Simulated, cluster_of, expected, settle
from _situations import moving

from distkv_dask.messages import from_worker as did
from distkv_dask.messages import to_worker as to
from distkv_dask.messages.names import Transfer
from distkv_dask.placement import Endpoint, Move, Span
from distkv_dask.sampling import SamplingParams
from distkv_dask.scheduler.ledger.ledger import Ledger
from distkv_dask.scheduler.moves.drain import fits_elsewhere, moves_away


def sends(commands: list[object]) -> to.Send:
    (found,) = (one for one in commands if isinstance(one, to.Send))
    return found


def expect(cluster: Simulated) -> to.Send:
    """Answer for the target of a move; returns the message to its source."""
    (number,) = cluster.life.moves.under_way
    commands = cluster.watch()
    cluster.handle(did.Expected(SPARE, Transfer("move", number)))
    return sends(commands)


@pytest.mark.parametrize("decodes", ["home", "target", "nobody"])
def test_a_move_hides_under_the_steps_of_whoever_takes_part_and_decodes(decodes: str) -> None:
    cluster = moving("expecting", False)
    home = cluster.life.ledger.sequences[ONE].home
    life = cluster.life
    life.moves.step_seconds = {home: 0.3, SPARE: 0.5}
    if decodes == "target":
        life.chains[SPARE].sequences[ONE] = ()
    if decodes == "nobody":
        life.chains[home].sequences.clear()
    send = expect(cluster)
    pace = {"home": 0.3, "target": 0.5, "nobody": 0.0}[decodes]
    assert send.pace == pace
    (one,) = life.moves.under_way.values()
    steps = (send.stop - send.start) / life.config.move_tokens_per_step
    assert one.late == pytest.approx(life.now + life.config.timeout_start + 4 * pace * steps)
    life.chains[SPARE].sequences.pop(ONE, None)


def test_a_sequence_that_pauses_moves_as_fast_as_can_be_and_only_what_is_there() -> None:
    cluster = moving("pausing", True)
    account = cluster.life.ledger.sequences[ONE]
    cluster.life.moves.step_seconds = {account.home: 0.3}
    (other,) = {"w0", "w1"} - {account.home}
    cluster.life.chains[account.home].sequences[99] = ()  # it also decodes another sequence
    commands = cluster.watch()
    (retirement,) = cluster.retirements
    cluster.retirements.clear()
    cluster.handle(did.Retired(*retirement))
    del cluster.life.chains[account.home].sequences[99]
    send = sends(commands)
    assert send.pace == 0.0
    assert (send.start, send.stop) == (account.placement[-1].start, account.length)
    assert other not in (send.worker, send.target)


def test_moved_blocks_are_counted_once_they_lie_there() -> None:
    cluster = moving("switching", False)
    assert cluster.life.moves.moved_blocks == 0
    (number,) = cluster.life.moves.under_way
    cluster.handle(did.Relocated("w1", number))
    cluster.moves.clear()
    assert cluster.life.moves.moved_blocks == 2
    assert cluster.life.ledger.sequences[ONE].placement[0] == Span(SPARE, 0, 2 * BLOCK)


@pytest.mark.parametrize("phase", ["expecting", "sending", "switching"])
def test_a_move_that_takes_too_long_is_given_up_but_never_a_switch(phase: str) -> None:
    cluster = moving(phase, False)
    cluster.moves.clear()
    commands = cluster.watch()
    cluster.tick(1e6)
    freed = [one for one in commands if isinstance(one, to.Free)]
    assert bool(freed) == (phase != "switching")
    assert bool(cluster.life.moves.under_way) == (phase == "switching")
    assert cluster.life.ledger.workers[SPARE].used == (2 if phase == "switching" else 0)


@pytest.mark.parametrize("phase", ["expecting", "pausing", "sending"])
def test_a_paused_sequence_decodes_again_when_its_target_is_gone(phase: str) -> None:
    cluster = moving(phase, True)
    cluster.moves.clear()
    commands = cluster.watch()
    cluster.handle(lose(cluster, SPARE))
    while cluster.retirements:
        cluster.handle(did.Retired(*cluster.retirements.pop()))
    assert sum(isinstance(one, to.Join) for one in commands) == (phase != "expecting")
    assert not cluster.life.moves.under_way
    settle(cluster)
    assert cluster.tokens[ONE] == expected(ONE, 9)


# Workers that leave, and workers that Dask pauses


def test_a_worker_gets_work_again_only_when_it_neither_leaves_nor_is_paused() -> None:
    cluster = cluster_of(1, 8, 8)
    account = cluster.life.ledger.workers["w1"]

    def said(*happenings: object) -> list[bool]:
        found = []
        for one in happenings:
            if isinstance(one, bool):
                cluster.drain("w1", one)
            else:
                cluster.pause(*([one] if one else []))
            found.append(account.retiring)
        return found

    assert said("w1", True, False, "") == [True, True, True, False]
    assert said(True, "w1", "", False) == [True, True, True, False]
    assert said("w1", "w0", "") == [True, False, False]
    assert not cluster.life.ledger.workers["w0"].retiring


def ledger_of(*capacities: int, memory: tuple[str, ...] = ()) -> Ledger:
    ledger = Ledger(BLOCK, batch=2)
    for number, capacity in enumerate(capacities):
        name = f"w{number}"
        ledger.add_worker(Endpoint(name, "host", 1), capacity, can_decode=name not in memory)
    return ledger


def test_blocks_fit_elsewhere_where_there_is_room_and_somebody_who_can_decode() -> None:
    ledger = ledger_of(8, 3, 4, memory=("w1", "w2"))
    assert fits_elsewhere(ledger, {"w0"}), "there is nothing on it"
    ledger.reserve(1, (Span("w0", 0, 7 * BLOCK),))
    assert not fits_elsewhere(ledger, {"w0"}), "nobody else has weights"
    ledger.add_worker(Endpoint("w3", "host", 1), 1)
    assert fits_elsewhere(ledger, {"w0"})
    ledger.retire_worker("w2")
    assert not fits_elsewhere(ledger, {"w0"})


def test_a_tail_moves_with_its_home_to_a_worker_with_room_for_it_and_in_its_batch() -> None:
    ledger = ledger_of(8, 20, 10, 9, 8)
    ledger.reserve(1, (Span("w0", 0, 4 * BLOCK),))
    ledger.commit(1, 2 * BLOCK)
    for number in (2, 3):
        ledger.reserve(number, (Span("w1", 0, BLOCK),))  # a full batch
    ledger.reserve(4, (Span("w3", 0, 6 * BLOCK),))
    ledger.retire_worker("w0")
    ledger.retire_worker("w4")
    found = list(moves_away(ledger, "w0", {1: 2 * BLOCK}))
    full = [move for move, pauses in found if not pauses]
    whole = [move for move, pauses in found if pauses]
    assert full[0] == Move(1, 0, 2 * BLOCK, "w0", "w1")
    assert whole == [Move(1, 0, 4 * BLOCK, "w0", "w2")], "w1's batch is full, w3 has too little room, w4 leaves"


def test_of_several_workers_each_leaves_with_one_move_at_a_time() -> None:
    cluster = cluster_of(1, 8, 8, 20, 20)
    for number, tokens in ((1, 20), (2, 20)):
        cluster.submit(number, array("i", range(100 * number, 100 * number + tokens)), SamplingParams(max_new_tokens=9))
    while cluster.chunks:
        cluster.run_chunk(cluster.chunks[0][0])
    homes = [cluster.life.ledger.sequences[number].home for number in (1, 2)]
    for worker in homes:
        cluster.drain(worker)
    moves = [one.move for one in cluster.life.moves.under_way.values()]
    assert len({end for move in moves for end in (move.source, move.target)}) == 2 * len(moves)
    settle(cluster)
    assert [cluster.tokens[number] for number in (1, 2)] == [expected(1, 9), expected(2, 9)]
