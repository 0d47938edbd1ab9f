"""The simulator: every request is served or refused, costs follow the model, and the command writes what it says."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from distkv_dask.client.cli import main
from distkv_dask.errors import InvalidRequestError
from distkv_dask.scheduler.costs.presets import PRESETS
from distkv_dask.scheduler.policies import POLICIES
from distkv_dask.simulate.cluster import Simulation
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
    simulation.ledger.check()
    assert all(run.arrival.at <= run.admitted <= run.first <= end for run, end in outcome.finished)


def test_one_request_alone_takes_what_the_model_says() -> None:
    curve, prompt, output = A100.model.curve, 10_000, 101
    (run, end), *_ = Simulation(A100, 4, "local-only").run([Arrival(0.0, prompt, output)]).finished
    assert run.first == pytest.approx(curve.prefill(prompt), rel=1e-6)
    low, high = (curve.decode(1, tokens) for tokens in (prompt, prompt + output))
    assert (output - 1) * low <= end - run.first <= (output - 1) * high


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
    assert read_trace(tmp_path / "mooncake.jsonl", limit=1) == [Arrival(0.0, 6758, 500)]
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
