"""The simulator: every request is served or refused, costs follow the model, and the command writes its results."""

from __future__ import annotations

import itertools
import json
import random
from array import array
from dataclasses import replace
from pathlib import Path
from typing import Any

import dask
import pytest
from _examples import examples
from click.testing import CliRunner

from distkv_dask.client.cli import main
from distkv_dask.errors import InvalidRequestError
from distkv_dask.scheduler.costs.presets import PRESETS
from distkv_dask.scheduler.ledger.invariants import check_ledger
from distkv_dask.scheduler.policies import POLICIES
from distkv_dask.scheduler.policies.local_only import LocalOnly
from distkv_dask.simulate.cluster import Simulation
from distkv_dask.simulate.memory import Memory
from distkv_dask.simulate.prompts import BLOCK, Prompt
from distkv_dask.simulate.traces import Arrival, read_trace
from distkv_dask.simulate.workloads import WORKLOADS, workload_named

A100 = PRESETS["a100-7b"]
AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
"""
MOONCAKE = """{"timestamp": 0, "input_length": 6758, "output_length": 500, "hash_ids": [0, 1]}
{"timestamp": 3000, "input_length": 7322, "output_length": 490, "hash_ids": [0, 14]}
"""


@pytest.mark.parametrize("policy", list(POLICIES))
@pytest.mark.parametrize("prefill", [True, False])
@pytest.mark.parametrize("workload", ["v2-short-3", "v2-2000k", "v1-600k-30"])
def test_every_request_is_finished_or_refused_and_nothing_stays_reserved(
    policy: str, prefill: bool, workload: str
) -> None:
    arrivals = WORKLOADS[workload].generate(60)
    simulation = Simulation(A100, 16, policy, prefill=prefill)
    outcome = simulation.run(arrivals)
    assert len(outcome.finished) + len(outcome.refused) == 60
    assert not simulation.ledger.sequences
    assert not simulation.ledger.moves
    check_ledger(simulation.ledger)
    assert all(run.arrival.at <= run.admitted <= run.first <= end for run, end in outcome.finished)


def test_one_request_alone_takes_what_the_model_says() -> None:
    curve, prompt, output = A100.model.curve, 10_000, 101
    (run, end), *_ = Simulation(A100, 4, "local-only").run([Arrival(0.0, prompt, output)]).finished
    assert run.first == pytest.approx(curve.prefill(prompt), rel=1e-6)
    low, high = (curve.decode(1, tokens) for tokens in (prompt, prompt + output))
    assert (output - 1) * low <= end - run.first <= (output - 1) * high


def with_workers(workers: int | str, arrivals: list[Arrival]) -> tuple[float, float]:
    """Seconds to the first token of the first request, and of all, on four workers."""
    with dask.config.set({"distkv.prefill.workers": workers}):
        outcome = Simulation(PRESETS["cpu-smollm2"], 4, "overflow").run(arrivals)
    assert len(outcome.finished) == len(arrivals)
    return min(run.first for run, _ in outcome.finished), outcome.seconds


def test_all_workers_compute_a_prompt_that_comes_alone_and_a_batch_ends_sooner() -> None:
    alone, batch = [Arrival(0.0, 6000, 64)], [Arrival(0.0, 6000, 64)] * 9
    assert with_workers("auto", alone)[0] < with_workers(1, alone)[0] / 3
    assert with_workers("auto", batch)[0] == with_workers(1, batch)[0]
    assert with_workers("auto", batch)[1] < with_workers(1, batch)[1], "they help with the ninth"


def test_of_requests_that_come_together_the_one_that_takes_longest_is_first_whatever_their_order() -> None:
    prompts = [7_000, 9_000, 11_000]
    one = replace(A100, kv_tokens=12_000)  # room for one at a time
    for arrivals in itertools.permutations(Arrival(0.0, prompt, 5) for prompt in prompts):
        outcome = Simulation(one, 1, "best").run(arrivals)
        assert [run.arrival.prompt for run, _ in outcome.finished] == sorted(prompts, reverse=True)


def test_where_prompts_come_with_their_kv_the_policy_counts_answers_only() -> None:
    one = replace(A100, kv_tokens=12_000)
    arrivals = [Arrival(0.0, 11_000, 5), Arrival(0.0, 7_000, 20)]
    first = {
        prefill: Simulation(one, 1, "best", prefill=prefill).run(arrivals).finished[0][0].arrival.prompt
        for prefill in (True, False)
    }
    assert first == {True: 11_000, False: 7_000}


def test_a_context_larger_than_a_worker_is_served_by_borrowing_only() -> None:
    long = [Arrival(0.0, 3 * A100.kv_tokens, 50)]
    assert len(Simulation(A100, 8, "local-only").run(long).refused) == 1
    assert len(Simulation(A100, 8, "overflow").run(long).finished) == 1


def test_the_longest_sequence_fits_that_all_workers_hold_together() -> None:
    tokens = 4 * (A100.kv_tokens // 64) * 64
    for policy in ("overflow", "greedy", "best"):
        assert len(Simulation(A100, 4, policy, prefill=False).run([Arrival(0.0, tokens - 9, 10)]).finished) == 1


@pytest.mark.parametrize("prefill", [True, False])
def test_one_instance_is_slower_as_tensor_parallel_over_a_slow_network_and_the_same_on_one_host(prefill: bool) -> None:
    def seconds(workers: int, pipeline: bool) -> float:
        arrivals = WORKLOADS["v2-short-1"].generate(20)
        return Simulation(A100, workers, "single", prefill=prefill, pipeline=pipeline).run(arrivals).seconds

    assert seconds(16, pipeline=False) > 2 * seconds(16, pipeline=True)
    assert seconds(8, pipeline=False) == seconds(8, pipeline=True)


def test_traces_are_read_as_published(tmp_path: Path) -> None:
    (tmp_path / "azure.csv").write_text(AZURE)
    (tmp_path / "mooncake.jsonl").write_text(MOONCAKE)
    first, second = read_trace(tmp_path / "azure.csv", speedup=2)
    assert (first, second.prompt, second.output) == (Arrival(0.0, 374, 44), 396, 109)
    assert second.at == pytest.approx(4.314579 / 2)
    assert read_trace(tmp_path / "mooncake.jsonl", limit=1) == [Arrival(0.0, 6758, 500, blocks=(0, 1))]
    (tmp_path / "bad.csv").write_text("TIMESTAMP,ContextTokens\n2023-11-16 18:15:46,3\n")
    with pytest.raises(InvalidRequestError, match="request 1"):
        read_trace(tmp_path / "bad.csv")
    with pytest.raises(InvalidRequestError, match="not a trace"):
        read_trace(tmp_path / "trace.txt")


def test_workloads_have_their_published_ranges_and_shares() -> None:
    assert sum(name.startswith("v2") for name in WORKLOADS) == 9
    assert sum(name.startswith("v1") for name in WORKLOADS) == 18
    lengths = [arrival.prompt for arrival in WORKLOADS["v1-2000k-30"].generate(1000)]
    assert sum(length >= 60_000 for length in lengths) == pytest.approx(300, abs=3)
    assert max(lengths) <= 2_000_000
    assert all(arrival.prompt <= 60_000 for arrival in WORKLOADS["v2-short-3"].generate(1000))
    with pytest.raises(InvalidRequestError, match="v2-short-1"):
        workload_named("unknown")


def test_a_faster_link_between_hosts_never_hurts_what_lies_on_several() -> None:
    arrivals = [Arrival(0.0, 12 * A100.kv_tokens, 50)]
    slow = Simulation(A100, 16, "overflow").run(arrivals).seconds
    model = replace(A100.model, between=A100.model.inside)
    assert Simulation(replace(A100, model=model), 16, "overflow").run(arrivals).seconds < slow


def test_the_command_writes_the_documented_fields(tmp_path: Path) -> None:
    (tmp_path / "azure.csv").write_text(AZURE)
    out, picture = tmp_path / "out.json", tmp_path / "out.svg"
    arguments = ["simulate", "--trace", str(tmp_path / "azure.csv"), "--workers", "2", "--policy", "best"]
    done = CliRunner().invoke(main, [*arguments, "--json", str(out), "--plot", str(picture)])
    assert done.exit_code == 0, done.output
    written = json.loads(out.read_text())
    counts = ["policy", "workers", "requests", "finished", "refused"]
    sizes = ["throughput_tps", "longest_context_tokens", "moved_blocks"]
    assert list(written) == [*counts, *sizes, "queue_s", "ttft_s", "tpot_s"]
    assert (written["policy"], written["workers"], written["finished"]) == ("best", 2, 2)
    assert set(written["ttft_s"]) == {"p50", "p90", "p99"}
    assert picture.read_text().startswith("<svg")


def test_the_command_says_what_is_wrong_with_its_arguments() -> None:
    assert "either --trace or --workload" in CliRunner().invoke(main, ["simulate"]).output
    assert "v2-short-1" in CliRunner().invoke(main, ["simulate", "--workload", "nothing"]).output


def checked(workers: int, policy: str, **settings: Any) -> Simulation:
    """A cluster whose workers check that all KV is where it is expected."""
    simulation = Simulation(replace(A100, kv_tokens=4096), workers, policy, **settings)
    simulation.workers.memory = Memory(simulation.machine.state)
    return simulation


def shared_beginnings(requests: int, seed: int) -> list[Arrival]:
    """Requests of a few conversations, some of which begin alike for several blocks."""
    rng = random.Random(seed)
    arrivals = []
    for number in range(requests):
        ids = (rng.randrange(2), *(rng.choice([rng.randrange(3), 100 + number]) for _ in range(9)))
        arrivals.append(Arrival(number * 0.05, rng.randint(1, 10 * BLOCK), rng.randint(1, 300), ids))
    return arrivals


@pytest.mark.parametrize("policy", sorted(POLICIES.keys() - {"single"}))
@pytest.mark.parametrize("seed", range(examples(3)))
def test_whatever_moves_is_shared_or_lost_kv_is_where_it_is_looked_for(policy: str, seed: int) -> None:
    simulation = checked(6, policy)
    losses = [(1.0, seed), (1.5, 4), (3.0, 5)]
    arrivals = shared_beginnings(60, seed)
    outcome = simulation.run(arrivals, losses)
    fit = {arrival for arrival in arrivals if not issubclass(POLICIES[policy], LocalOnly) or arrival.tokens <= 4096}
    assert {run.arrival for run, _ in outcome.finished} == fit
    assert set(outcome.refused) == set(arrivals) - fit
    assert len(simulation.lanes) == 3
    check_ledger(simulation.ledger)
    for worker, account in simulation.ledger.workers.items():
        held = sum(map(len, simulation.workers.memory.pools[worker].values()))
        assert (account.used, held) == (0, account.cached)


def test_a_prompt_that_begins_like_one_before_is_computed_from_there_on() -> None:
    ids = tuple(range(16))
    arrivals = [Arrival(at, 16 * BLOCK, 50, ids) for at in (0.0, 100.0)]
    (first, _), (second, _) = Simulation(A100, 1, "overflow").run(arrivals).finished
    shared = 16 * BLOCK - 64  # a prompt's last token is always computed, and only whole blocks are shared
    assert first.first == pytest.approx(A100.model.curve.prefill(16 * BLOCK))
    assert second.first - 100 == pytest.approx(A100.model.curve.prefill(64, shared))
    others = [replace(arrival, blocks=()) for arrival in arrivals]
    (_, _), (second, _) = Simulation(A100, 1, "overflow").run(others).finished
    assert second.first - 100 == pytest.approx(A100.model.curve.prefill(16 * BLOCK)), "nothing is known of its tokens"
    mixed = Simulation(A100, 1, "overflow").run([others[0], replace(others[1], at=50.0), arrivals[1]]).finished
    alone = pytest.approx(A100.model.curve.prefill(16 * BLOCK))
    assert [run.first - run.arrival.at for run, _ in mixed] == [alone] * 3, "ids of one prompt say nothing of others"


def test_idle_chats_come_back_from_lower_tiers() -> None:
    small = replace(PRESETS["cpu-smollm2"], kv_tokens=6 * BLOCK)
    turns = [(turn, number) for turn in range(4) for number in range(8)]
    arrivals = [
        Arrival(100.0 * at, (turn + 1) * BLOCK, 8, tuple(range(100 * number, 100 * number + turn + 1)))
        for at, (turn, number) in enumerate(turns)
    ]
    waits: dict[str, float] = {}
    for tier in ("memory", "disk"):
        with dask.config.set({"distkv.prefix-cache-tier": tier}):
            finished = Simulation(small, 2, "overflow").run(arrivals).finished
        waits[tier] = sum(run.first - run.arrival.at for run, _ in finished)
        assert len(finished) == len(arrivals)
    assert waits["disk"] < 0.7 * waits["memory"]


@pytest.mark.parametrize("policy", ["local-only", "best"])
def test_a_long_prompt_does_not_cross_a_slow_network_for_a_short_beginning_that_is_cached_elsewhere(
    policy: str,
) -> None:
    apart, prompt = replace(A100, per_host=1), 50_000
    arrivals = [Arrival(0.0, 1_000, 2, (7, 1)), *[Arrival(10.0, prompt, 2, (7, n)) for n in range(2, 6)]]
    finished = Simulation(apart, 4, policy).run(arrivals).finished
    alone = apart.model.curve.prefill(prompt)
    assert all(run.first - run.arrival.at < 1.01 * alone for run, _ in finished)


def test_requests_on_a_lost_worker_are_computed_again_and_all_end_later() -> None:
    arrivals = WORKLOADS["v2-short-1"].generate(40)
    whole, less = (Simulation(A100, 4, "overflow").run(arrivals, losses) for losses in ([], [(5.0, 1)]))
    assert [len(outcome.finished) for outcome in (whole, less)] == [40, 40]
    assert less.seconds > whole.seconds
    assert {name for _, used in less.memory[-2:] for name in used} == {"w00000", "w00002", "w00003"}


def test_what_no_longer_fits_on_the_workers_that_are_left_is_given_up() -> None:
    arrivals = [Arrival(0.0, 2 * A100.kv_tokens - 2000, 100), Arrival(0.0, 1000, 100)]
    outcome = Simulation(A100, 2, "overflow").run(arrivals, [(1.0, 1)])
    assert [run.arrival for run, _ in outcome.finished] == arrivals[1:]
    assert outcome.refused == arrivals[:1]


def test_a_window_is_as_long_as_the_configuration_says() -> None:
    def first(seconds: str) -> float:
        with dask.config.set({"distkv.window.seconds": seconds, "distkv.window.stream-seconds": seconds}):
            arrivals = [Arrival(0.0, 100, 2000), Arrival(1.0, 100, 2)]
            outcome = Simulation(A100, 1, "overflow").run(arrivals)
        return next(run.first for run, _ in outcome.finished if run.arrival.at)

    assert first("0.5 s") < 2.5
    assert first("6 s") > 6, "a prompt that comes waits for the window that runs"


def test_prompts_of_known_length_are_like_arrays_of_their_tokens() -> None:
    ids = (5, 6, 7)
    plain = array("i", [token for number in (5, 6, 7, 0) for token in [number] * BLOCK])[:1600]
    prompt = Prompt(1600, ids)
    assert len(prompt) == 1600
    assert [*prompt] == [*plain]
    assert prompt == Prompt(1600, ids) != Prompt(1601, ids)
    for part in (
        slice(0, 10),
        slice(None, 700),
        slice(500, 1100),
        slice(1590, None),
        slice(1700, 1800),
        slice(None, -1),
    ):
        assert [*prompt[part]] == [*plain[part]], part
    assert prompt[511] == 5
    assert prompt + array("i", [9]) == plain + array("i", [9])
    assert (prompt + array("i")) is prompt


def test_the_command_loses_workers_that_there_are(tmp_path: Path) -> None:
    arguments = ["simulate", "--workload", "v2-short-1", "--requests", "20", "--workers", "3"]
    plain, less = (CliRunner().invoke(main, [*arguments, *more]) for more in ([], ["--lose", "1:0", "--lose", "2:2"]))
    assert less.exit_code == 0, less.output
    assert "20 finished" in less.output
    assert less.output != plain.output
    assert "worker 3 does not exist" in CliRunner().invoke(main, [*arguments, "--lose", "1:3"]).output
    assert "TIME:WORKER" in CliRunner().invoke(main, [*arguments, "--lose", "soon"]).output
    assert "0 seconds or later" in CliRunner().invoke(main, [*arguments, "--lose", "nan:1"]).output
