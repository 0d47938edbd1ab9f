"""A trace shows correctly how time was spent, costs nothing while it is off, and survives the failures it must show."""

from __future__ import annotations

import json
import os
import signal
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from distributed import Client, LocalCluster, Scheduler, Worker

from distkv_dask import DistKVError, Engine, SamplingParams
from distkv_dask.worker.holder import session
from distkv_dask.worker.holder.session import Session
from distkv_dask.worker.trace import Ring
from tests._cluster import ON_CARD, PROTOCOL, engine_test
from tests._models import model_dir, prompt_ids, reference_generate
from tests._splits import force_split

PROMPT, NEW, LAYERS = 100, 9, 3
GREEDY = SamplingParams(max_new_tokens=NEW, ignore_eos=True)
SPLITS = {"one holder": [(0, 64), (1, None)], "two holders": [(1, 40), (2, 40), (0, None)]}


def tiny(client: Client, trace: Path | None, **settings: Any) -> Engine:
    defaults = {"dtype": "float32", "kv_memory": "4 MiB", "block_tokens": 8, "prefill_chunk_tokens": 64}
    where = None if trace is None else str(trace)
    return Engine(client, str(model_dir("llama-gqa")), trace=where, **(defaults | settings))


def spans(file: Path) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Complete spans by worker and lane, those that contain others first."""
    events = json.loads(file.read_text())["traceEvents"]
    workers = {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}
    lanes = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    found: defaultdict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for event in events:
        if event["ph"] == "X":
            nanos = {"began": round(event["ts"] * 1000), "ended": round((event["ts"] + event["dur"]) * 1000)}
            found[workers[event["pid"]], lanes[event["tid"]]].append(event | nanos)
    for lane in found.values():
        lane.sort(key=lambda one: (one["began"], -one["ended"]))
    return dict(found)


def holders_seen(file: Path) -> bool:
    """Whether spans of a holder lane are in the file, which is being written."""
    try:
        return any("holder lane" in lane for _, lane in spans(file))
    except json.JSONDecodeError:  # read while a part was written
        return False


def assert_nested(lane: list[dict[str, Any]]) -> None:
    """Check that any two spans of a lane are disjoint, or one contains the other."""
    around: list[dict[str, Any]] = []
    for one in lane:
        while around and around[-1]["ended"] <= one["began"]:
            around.pop()
        assert not around or one["ended"] <= around[-1]["ended"], (around[-1], one)
        around.append(one)


@pytest.mark.parametrize("split", SPLITS)
def test_every_layer_of_every_step_is_there_on_home_and_holders(
    split: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = reference_generate(model_dir("llama-gqa"), [prompt_ids(PROMPT, seed=4)], NEW)[0].tokens
    file = tmp_path / "trace.json"
    holders = len(SPLITS[split]) - 1

    @engine_test(workers=force_split(SPLITS[split], monkeypatch))
    async def run(client: Client, scheduler: Scheduler, *them: Worker) -> None:
        async with tiny(client, file, window_seconds=60) as engine:  # one window, however slow the machine
            done = (await engine.generate([prompt_ids(PROMPT, seed=4)], GREEDY))[0]
            assert list(done.token_ids) == expected
            homes.append(done.placement[-1].worker)

    homes: list[str] = []
    run()
    lanes = spans(file)
    for lane in lanes.values():
        assert_nested(lane)
    home = lanes[homes[0], "home lane"]
    steps = [one for one in home if one["name"] == "step"]
    assert [one["args"]["step"] for one in steps] == list(range(NEW - 1))
    for step in steps:
        inside = [one for one in home if step["began"] <= one["began"] and one["ended"] <= step["ended"]]
        names = [one["name"] for one in inside if "layer" in one["args"]]
        assert names.count("attention") == names.count("local attention") == LAYERS
        assert names.count("send") == holders * LAYERS
        assert names.count("merge") == (min(holders, 1) if ON_CARD else holders) * LAYERS, "a card merges all at once"
        peers = {one["args"].get("peer") for one in inside if one["name"] == "wait"}
        assert len(peers - {None}) == holders
        forward = next(one for one in inside if one["name"] == "forward")
        parts = [one["dur"] for one in inside if one["name"] in ("model", "attention")]
        assert len(parts) == 2 * LAYERS + 1
        gaps = forward["dur"] - sum(parts)
        assert 0 <= gaps < 0.5 * forward["dur"] + 5000  # nothing is counted twice, and little is left out
    sent = [one for one in home if one["name"] == "send"]
    answers = [
        one
        for (worker, lane), them in lanes.items()
        if lane == "holder lane"
        for one in them
        if one["name"] == "answer"
    ]
    asked = [one for (_, lane), them in lanes.items() if lane == "home lane" for one in them if one["name"] == "send"]
    assert len(sent) >= holders * LAYERS * (NEW - 1)
    assert len(answers) == len(asked)
    assert any(one["name"] == "chunk" for one in home)
    assert all(one["cat"] in ("compute", "wait", "send", "frame") for lane in lanes.values() for one in lane)


def test_without_a_trace_nothing_is_recorded_or_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def recorded(*args: object, **options: object) -> int:
        raise AssertionError("a span was recorded")

    monkeypatch.setattr(Ring, "put", recorded)

    @engine_test(workers=force_split(SPLITS["one holder"], monkeypatch))
    async def run(client: Client, scheduler: Scheduler, *them: Worker) -> None:
        async with tiny(client, None) as engine:
            assert (await engine.generate([prompt_ids(PROMPT)], GREEDY))[0].finish_reason == "length"

    run()
    assert list(tmp_path.iterdir()) == []


def test_a_gang_that_fails_leaves_a_trace_of_how_far_it_came(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, asked = tmp_path / "trace.json", []

    def attend(_: Session, header: object) -> None:
        asked.append(header)
        raise RuntimeError("no memory left")

    monkeypatch.setattr(Session, "_attend", attend)
    monkeypatch.setattr(session, "new_turns", lambda *given: None)  # so that Python answers, which calls _attend

    @engine_test(workers=force_split(SPLITS["one holder"], monkeypatch))
    async def run(client: Client, scheduler: Scheduler, *them: Worker) -> None:
        async with tiny(client, file) as engine:
            with pytest.raises(DistKVError):
                await engine.submit(prompt_ids(PROMPT), GREEDY)

    run()
    lanes = spans(file)
    for lane in lanes.values():
        assert_nested(lane)
    assert asked
    assert sum(one["name"] == "answer" for lane in lanes.values() for one in lane) == len(asked)


@pytest.mark.slow
def test_a_trace_keeps_what_a_killed_worker_did(tmp_path: Path) -> None:
    file = tmp_path / "trace.json"
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, protocol=PROTOCOL, dashboard_address=None) as cluster,
        Client(cluster) as client,
        tiny(client, file, kv_memory="2 MiB", window_steps=4) as engine,
    ):
        running = engine.submit(prompt_ids(300), SamplingParams(max_new_tokens=900, ignore_eos=True))
        while not holders_seen(file):
            assert not running.done()
            time.sleep(0.02)
        victim = engine.status().sequences[0].placement[0].worker
        os.kill(client.run(os.getpid, workers=[victim])[victim], signal.SIGKILL)
        while not engine.status().totals.get("repair_events"):
            assert not running.done()
            time.sleep(0.05)
        running.cancel()
    lanes = spans(file)
    for lane in lanes.values():
        assert_nested(lane)
    assert any(one["name"] == "answer" for one in lanes[victim, "holder lane"])
