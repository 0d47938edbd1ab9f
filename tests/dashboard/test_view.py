"""The dashboard's view agrees with the ledger, and stays small however large the cluster is."""

from __future__ import annotations

import itertools
from array import array

from distkv_dask.config import Config
from distkv_dask.messages.client_calls import Generate, Ingest
from distkv_dask.placement import Endpoint
from distkv_dask.sampling import SamplingParams
from distkv_dask.scheduler.dashboard.view import SEQUENCES, WORKERS, view_of
from distkv_dask.scheduler.engines.figures import Figures
from distkv_dask.scheduler.ledger.invariants import check_ledger
from distkv_dask.scheduler.lifecycle.events import Submit, WorkerReady
from distkv_dask.scheduler.lifecycle.machine import Lifecycle
from distkv_dask.scheduler.records.machine_state import MachineState


def crowd(workers: int, sequences: int, blocks: int = 100) -> Lifecycle:
    """A lifecycle with sequences of 100 to 400 tokens waiting, in prefill, and placed."""
    config = Config.load(block_tokens=16, window_batch=1000)
    machine = Lifecycle(MachineState("engine", config, itertools.count(1), block_bytes=1024))
    for at in range(workers):
        machine.handle(WorkerReady(Endpoint(f"w{at}", "127.0.0.1", at), blocks), 0.0)
    for number in range(sequences):
        prompt = array("i", [1] * (100 + number % 300))
        machine.handle(Submit((Generate(number, prompt, SamplingParams(max_new_tokens=8)),)), 0.0)
    return machine


def test_bars_add_up_to_the_ledger_and_nothing_is_left_out() -> None:
    life = crowd(workers=5, sequences=12, blocks=9).state
    shown = view_of(life, Figures(), "m", str, 1.0)
    for bar in shown.workers:
        account = life.ledger.workers[bar.label]
        assert (bar.own + bar.lent, bar.cached + bar.free) == (account.used, account.free)
    assert sum(bar.lent for bar in shown.workers) == sum(blocks for _, _, blocks in shown.debts)
    assert sum(bar.borrowed for bar in shown.workers) == sum(blocks for _, _, blocks in shown.debts)
    assert sum(shown.states.values()) == 12


def test_blocks_of_documents_are_told_apart_from_those_of_requests() -> None:
    machine = crowd(workers=3, sequences=1, blocks=9)
    life = machine.state
    for number in (7, 8):  # the second needs more than one worker
        document = array("i", [number] * (100 if number == 7 else 200))
        machine.handle(Submit((Ingest(number, document),)), 0.0)
    check_ledger(life.ledger)
    shown = view_of(life, Figures(), "m", str, 1.0)
    documents = {number for number in (7, 8) if number in life.ledger.sequences}
    assert documents == {7, 8}
    blocks = sum(life.ledger.blocks(span.tokens) for number in documents for span in life.ledger.sequences[number].own)
    assert sum(bar.documents for bar in shown.workers) == blocks > 0
    requests = sum(life.ledger.blocks(span.tokens) for span in life.ledger.sequences[0].own)
    assert sum(bar.own + bar.lent for bar in shown.workers) == requests > 0
    for bar in shown.workers:
        assert bar.own + bar.lent + bar.documents + bar.cached + bar.free == 9
        assert min(bar.own, bar.lent, bar.documents, bar.cached, bar.free) >= 0


def test_a_large_cluster_is_cut_to_what_a_person_can_read_and_says_what_is_left_out() -> None:
    life = crowd(workers=200, sequences=1000).state
    shown = view_of(life, Figures(), "m", str, 1.0)
    assert len(shown.workers) == WORKERS + 1
    assert shown.more_workers == 200 - WORKERS
    assert shown.workers[-1].label == "160 others"
    assert len(shown.sequences) == SEQUENCES
    assert shown.more_sequences == 1000 - SEQUENCES
    total = sum(bar.own + bar.lent + bar.documents + bar.cached + bar.free for bar in shown.workers)
    assert total == life.ledger.capacity_blocks


def test_a_strip_shows_each_spans_stored_tokens() -> None:
    life = crowd(workers=3, sequences=1, blocks=4).state
    life.ledger.commit(0, 90)
    row = view_of(life, Figures(), "m", str, 1.0).sequences[0]
    assert row.stored == 90 == sum(tokens for _, tokens in row.strip)
    assert [worker for worker, _ in row.strip] == [span.worker for span in life.ledger.sequences[0].placement]
