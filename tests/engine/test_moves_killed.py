"""Real processes killed while blocks of a running request move: the right answer, and nothing left behind."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from distributed import Client, LocalCluster, Worker

from distkv_dask import Engine, SamplingParams
from distkv_dask.placement import Move
from distkv_dask.scheduler.ledger.invariants import check_ledger
from distkv_dask.scheduler.ledger.ledger import Ledger
from distkv_dask.scheduler.policies.base import Policy
from distkv_dask.scheduler.policies.overflow import Overflow
from distkv_dask.scheduler.records.machine_state import MachineState
from tests._models import model_dir, prompt_ids, reference_generate

pytestmark = pytest.mark.slow
THOROUGH = pytest.mark.thorough

NEW = 200
WIDE = prompt_ids(1400)  # 1600 tokens including its answer, on two workers with room for 1365 each
SHORT = prompt_ids(20, seed=9)
SLOW: dict[str, Any] = {
    "dtype": "float32",
    "kv_memory": "4 MiB",
    "block_tokens": 8,
    "prefill_chunk_tokens": 128,
    "window_steps": 4,
    "move_tokens_per_step": 1,  # a move takes hundreds of steps, so that it is seen in progress on any machine
}


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    """Three worker processes with nannies, which replace killed ones; their scheduler is in this process."""
    with LocalCluster(n_workers=3, threads_per_worker=1, dashboard_address=None) as cluster:
        yield cluster


def wait_for(what: Callable[[], Any], seconds: float = 60) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := what():
            return found
        time.sleep(0.005)
    raise AssertionError(f"it did not happen within {seconds:g} s: {what}")


def propose(monkeypatch: pytest.MonkeyPatch, wanted: list[Move]) -> None:
    """Make the policy propose these moves and no others."""

    def moves(policy: Policy, ledger: Ledger, waiting: object) -> list[Move]:
        return [wanted.pop()] if wanted else []

    monkeypatch.setattr(Overflow, "moves", moves)


def used_blocks(dask_worker: Worker) -> int:
    engines = dask_worker.plugins["distkv"].engines.values()
    return sum(engine.runtime.pool.used_blocks for engine in engines)


def assert_nothing_is_left(client: Client, life: MachineState) -> None:
    """Check that ledger and pools are empty except for cached blocks, on all three workers and their replacements."""
    wait_for(lambda: len(life.ledger.workers) == 3)
    wait_for(lambda: not life.requests)
    assert not life.ledger.sequences
    assert not life.ledger.moves
    assert not life.ledger.owes
    assert not any(map(life.moves.busy, life.ledger.workers))
    assert [account.used for account in life.ledger.workers.values()] == [0] * 3
    check_ledger(life.ledger)
    cached = {worker: account.cached for worker, account in life.ledger.workers.items()}
    wait_for(lambda: client.run(used_blocks) == cached)


@pytest.mark.parametrize("victim", ["source", *(pytest.param(one, marks=THOROUGH) for one in ("target", "home"))])
def test_a_worker_killed_in_mid_move_costs_no_token(
    cluster: LocalCluster, victim: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted: list[Move] = []
    propose(monkeypatch, wanted)
    sampling = SamplingParams(max_new_tokens=NEW, ignore_eos=True)
    wide_tokens, short_tokens = (one.tokens for one in reference_generate(model_dir("llama-gqa"), [WIDE, SHORT], NEW))
    with Client(cluster) as client, Engine(client, str(model_dir("llama-gqa")), **SLOW) as engine:
        (state,) = cluster.scheduler.plugins["distkv"].engines.values()
        life: MachineState = state.life
        wide, short = engine.submit(WIDE, sampling), engine.submit(SHORT, sampling)
        wait_for(lambda: len(life.requests) == 2 and all(len(one.generated) > 1 for one in life.requests.values()))
        source, home = (span.worker for span in life.ledger.sequences[0].placement)
        target = life.ledger.sequences[1].home
        assert len({source, target, home}) == 3
        pids = client.run(os.getpid)
        span = life.ledger.sequences[0].placement[0]
        wanted.append(Move(0, span.start, span.stop, source, target))
        wait_for(lambda: any(one.phase == "sending" for one in list(life.moves.under_way.values())))
        os.kill(pids[{"source": source, "target": target, "home": home}[victim]], signal.SIGKILL)
        wait_for(lambda: len(life.ledger.workers) == 2)
        assert life.moves.moved_blocks == 0, "the move was over before the kill"
        assert [list(one.result(120).token_ids) for one in (wide, short)] == [wide_tokens, short_tokens]
        assert engine.status().totals["repair_events"] == 1
        assert_nothing_is_left(client, life)
        again = engine.generate([WIDE, SHORT], SamplingParams(max_new_tokens=20, ignore_eos=True))
        assert [list(one.token_ids) for one in again] == [wide_tokens[:20], short_tokens[:20]]
        assert_nothing_is_left(client, life)
