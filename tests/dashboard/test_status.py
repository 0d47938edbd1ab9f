"""A status agrees with the ledger, is sent complete, and has the JSON keys that monitoring reads."""

from __future__ import annotations

import itertools
import json
import pickle
from array import array
from collections.abc import Iterator
from typing import Any

import pytest

from distkv_dask import EngineStatus, SequenceStatus, WorkerStatus
from distkv_dask.completion import Timings
from distkv_dask.config import Config
from distkv_dask.geometry import Geometry, Measurement
from distkv_dask.messages.client_calls import Generate, Ingest
from distkv_dask.messages.from_worker import Opened
from distkv_dask.messages.status import EngineSummary
from distkv_dask.placement import Endpoint
from distkv_dask.sampling import SamplingParams
from distkv_dask.scheduler.engines.figures import Figures
from distkv_dask.scheduler.engines.status import status_of
from distkv_dask.scheduler.lifecycle.events import Submit, WorkerReady
from distkv_dask.scheduler.lifecycle.machine import Lifecycle
from distkv_dask.scheduler.records.machine_state import MachineState

GEOMETRY = Geometry(2, 4, 2, 8, 100, 1000, "float32")

KEYS = [
    "workers",
    "workers.*",
    "workers.*.role",
    "workers.*.capacity_blocks",
    "workers.*.used_blocks",
    "workers.*.lent_blocks",
    "workers.*.blocks",
    "workers.*.blocks.own",
    "workers.*.blocks.lent",
    "workers.*.blocks.documents",
    "workers.*.blocks.cached",
    "workers.*.blocks.free",
    "workers.*.tiers",
    "workers.*.tiers.memory",
    "workers.*.tiers.workers",
    "workers.*.tiers.disk",
    "workers.*.block_bytes",
    "workers.*.disk_bytes",
    "workers.*.disk_error",
    "workers.*.host_bytes",
    "workers.*.sequences",
    "workers.*.channels",
    "workers.*.device",
    "workers.*.kernels",
    "workers.*.weights",
    "workers.*.adapters",
    "workers.*.adapter_bytes",
    "workers.*.window_seconds",
    "workers.*.performance",
    "workers.*.performance.step",
    "workers.*.performance.row",
    "workers.*.performance.token",
    "workers.*.performance.prompt",
    "workers.*.performance.pair",
    "workers.*.performance.measured",
    "workers.*.performance.slower",
    "sequences",
    "sequences.*",
    "sequences.*.state",
    "sequences.*.aside",
    "sequences.*.document",
    "sequences.*.name",
    "sequences.*.saved",
    "sequences.*.prompt_tokens",
    "sequences.*.generated_tokens",
    "sequences.*.questions",
    "sequences.*.kv_tokens",
    "sequences.*.home",
    "sequences.*.placement",
    "sequences.*.placement.0",
    "sequences.*.placement.1",
    "sequences.*.placement.2",
    "debts",
    "debts.0",
    "debts.1",
    "debts.2",
    "epoch",
    "block_tokens",
    "scheduler",
    "scheduler.tasks_per_second",
    "scheduler.task_seconds",
    "scheduler.core_share",
    "state_bytes",
    "speculation",
    "exchange_seconds",
    "links",
    "totals",
    "totals.prefilled_tokens",
    "totals.move_events",
    "totals.finished_length",
    "totals.moved_blocks",
]
"""Keys in the order of output; ``*`` stands for any worker or sequence, numbers for positions in a list."""


def keys(value: Any, *path: str) -> Iterator[str]:
    """The keys of a JSON value and of all values in it."""
    if path:
        yield ".".join(path)
    if isinstance(value, dict):
        for name, one in value.items():
            yield from keys(one, *path, "*" if path in (("workers",), ("sequences",)) else name)
    elif isinstance(value, list):
        for at, one in enumerate(value):  # a list of lists is a table with rows of the same form
            yield from keys(one, *path, str(at)) if not isinstance(one, list) else keys(one, *path)


def opened(worker: str) -> Opened:
    measured = Measurement() if worker == "w0" else None
    endpoint, sizes = Endpoint(worker, "h", 1), (9, 1024, 0, 0, 64)
    said = measured, "torch", "mapped"
    return Opened(worker, endpoint, "instance", "unix", "cpu", *sizes, GEOMETRY, "weights", *said)


@pytest.fixture
def life() -> MachineState:
    """Three workers of 9 blocks; a request on two of them, a document, and a request that waits."""
    machine = Lifecycle(MachineState("engine", Config.load(block_tokens=16), itertools.count(1), block_bytes=1024))
    for at in range(3):
        machine.handle(WorkerReady(Endpoint(f"w{at}", "127.0.0.1", at), 9), 0.0)
    sampling = SamplingParams(max_new_tokens=8)
    for submission in (
        Generate(0, array("i", [1] * 220), sampling),
        Ingest(1, array("i", [2] * 100), name="report"),
        Generate(2, array("i", [3] * 120), sampling),
    ):
        machine.handle(Submit((submission,)), 0.0)
    return machine.state


@pytest.fixture
def status(life: MachineState) -> EngineStatus:
    figures = Figures()
    figures.prefilled(7)
    figures.happened(0.0, "move", "")
    figures.ended("length", Timings(), 2)
    return status_of(life, figures, {worker: opened(worker) for worker in ("w0", "w1")})


def test_workers_have_the_ledgers_blocks_and_what_they_said(life: MachineState, status: EngineStatus) -> None:
    assert list(status.workers) == ["w0", "w1", "w2"]
    for worker, one in status.workers.items():
        assert isinstance(one, WorkerStatus)
        account = life.ledger.workers[worker]
        assert (one.capacity_blocks, one.used_blocks, one.lent_blocks) == (9, account.used, account.lent)
        assert one.blocks.own + one.blocks.lent + one.blocks.documents == one.used_blocks
        assert one.blocks.cached + one.blocks.free == 9 - one.used_blocks
        assert (one.role, one.block_bytes, one.disk_bytes, one.host_bytes) == ("instance", 1024, 0, 0)
        homed = [two for two in status.sequences.values() if two.home == worker and not two.document]
        assert one.sequences == len(homed)
    assert [one.channels for one in status.workers.values()] == ["unix", "unix", ""]
    assert [one.kernels for one in status.workers.values()] == ["torch", "torch", ""]
    assert [one.performance.measured for one in status.workers.values()] == [True, False, False]
    assert sum(debt.blocks for debt in status.debts) == sum(one.lent_blocks for one in status.workers.values()) > 0
    for debt in status.debts:
        assert status.workers[debt.creditor].lent_blocks >= debt.blocks


def test_sequences_say_where_they_lie_and_what_they_wait_for(life: MachineState, status: EngineStatus) -> None:
    split, document, waiting = (status.sequences[number] for number in range(3))
    assert isinstance(split, SequenceStatus)
    assert (split.state, split.prompt_tokens, split.document, split.name) == ("prefill", 220, False, "")
    assert split.placement == life.ledger.sequences[0].placement
    assert len(split.placement) > 1
    assert split.home == split.placement[-1].worker
    assert (document.document, document.name, document.saved, document.questions) == (True, "report", False, 0)
    assert (waiting.state, waiting.home, waiting.placement, waiting.kv_tokens) == ("waiting", None, (), 0)


def test_a_status_arrives_as_it_was_sent(status: EngineStatus) -> None:
    assert pickle.loads(pickle.dumps(status)) == status


def test_as_json_it_has_the_keys_that_monitoring_reads_and_no_others(status: EngineStatus) -> None:
    read = json.loads(json.dumps(status.as_dict()))
    assert list(dict.fromkeys(keys(read))) == KEYS
    assert list(read["sequences"]) == ["0", "1", "2"]
    span = status.sequences[0].placement[0]
    assert read["sequences"]["0"]["placement"][0] == [span.worker, span.start, span.stop]
    assert read["debts"] == [list(debt) for debt in status.debts]


def test_an_open_engine_is_its_status_after_its_model_and_owner(status: EngineStatus) -> None:
    plain = EngineSummary("smollm2-135m", "float32", "Client-1", status).as_dict()
    assert list(plain.items())[:3] == [("model", "smollm2-135m"), ("dtype", "float32"), ("client", "Client-1")]
    assert list(plain)[3:] == list(status.as_dict())
    assert {name: plain[name] for name in status.as_dict()} == status.as_dict()
