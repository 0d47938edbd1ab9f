"""What does a remote holder add to a decode step, compared with the same attention at the home?

A model with ``--layers`` layers of SmolLM2's attention (9 heads, 3 KV heads, head dim 64) and almost nothing else
decodes one sequence, with all KV at its home or with one block of it on another worker. Engines for both are open on
the same cluster and take turns; the result is the median of the differences. The floor (a round trip of the same bytes
on a bare socket between two processes) and the same step as a Dask graph with one task per layer and worker are
measured, too.

``--holders 1,4,16`` also measures what a layer costs with these numbers of holders, which are real holder lanes in
forked processes without Dask. They take turns with their floor: the same number of bare sockets and processes.
"""

from __future__ import annotations

import argparse
import os
import secrets
import select
import socket
import statistics
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import transformers
from _fleet import BLOCK_TOKENS, Fleet, fork_server
from _report import parser, report
from distributed import Client, LocalCluster

from distkv_dask import Engine, SamplingParams
from distkv_dask.worker.home.lane import NICENESS

HEADS, KV_HEADS, HEAD_DIM, CONTEXT, BLOCK = 9, 3, 64, 512, 64
QUERY_BYTES, PARTIAL_BYTES = HEADS * HEAD_DIM * 2, HEADS * (HEAD_DIM + 1) * 4


def save_model(layers: int, folder: Path) -> None:
    """A model that is nearly all attention."""
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=72,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=8192,
    )
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)


def decode(engine: Engine, new: int) -> dict[str, float]:
    """Decode one sequence; returns milliseconds of a step, of its waiting, and of the gap between windows."""
    before = engine.status().totals
    completion = engine.submit([1] * (CONTEXT - new), SamplingParams(max_new_tokens=new, ignore_eos=True)).result()
    after = engine.status().totals
    gained = {name: after[name] - before.get(name, 0) for name in after}
    return {
        "holders": len(completion.placement) - 1,
        "step_ms": gained["decode_seconds"] / gained["decode_steps"] * 1e3,
        "waiting_ms": gained["waiting_seconds"] / gained["decode_steps"] * 1e3,
        "gap_ms": gained["gap_seconds"] / (gained["windows"] - 1) * 1e3,
    }


def _pong(address: tuple[str, int] | str) -> None:
    with connected(address) as peer:
        query, partial = bytearray(QUERY_BYTES), bytes(PARTIAL_BYTES)
        while peer.recv_into(query, QUERY_BYTES, socket.MSG_WAITALL):
            peer.sendall(partial)


def connected(address: tuple[str, int] | str) -> socket.socket:
    """A socket to a listener, TCP or Unix."""
    peer = socket.socket(socket.AF_UNIX if isinstance(address, str) else socket.AF_INET)
    peer.connect(address)
    without_delay(peer)
    return peer


def without_delay(peer: socket.socket) -> None:
    """Send small frames at once (TCP_NODELAY)."""
    if peer.family != socket.AF_UNIX:
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


class Floor:
    """Bare sockets to processes that answer messages of the size of queries with messages of the size of partials.

    Parameters
    ----------
    channel
        ``"unix"``; anything else is TCP.
    holders
        Number of processes.
    """

    def __init__(self, channel: str, holders: int) -> None:
        unix, context = channel == "unix", fork_server()
        with socket.socket(socket.AF_UNIX if unix else socket.AF_INET) as server:
            server.bind(f"\0distkv-floor-{secrets.token_hex(8)}" if unix else ("127.0.0.1", 0))
            server.listen(holders)
            name = server.getsockname()
            address = (name.decode() if unix else name,)
            self._processes = [context.Process(target=_pong, args=address, daemon=True) for _ in range(holders)]
            for process in self._processes:
                process.start()
            self._peers = [server.accept()[0] for _ in self._processes]
        for peer in self._peers:
            without_delay(peer)
        self._thread = ThreadPoolExecutor(1, initializer=_step_back)

    def __enter__(self) -> Floor:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown()
        for peer in self._peers:
            peer.close()
        for process in self._processes:
            process.join(10)

    def us(self, holders: int, pause_us: float, rounds: int = 300) -> float:
        """Median time to send queries to ``holders`` processes and to receive all their partials.

        Between two rounds the home computes for the time of a layer without exchange, because the processor of a peer
        that waits longer enters a deeper idle state. The home's thread has the priority of a home lane.
        """
        return self._thread.submit(_rounds, self._peers[:holders], pause_us * 1e-6, rounds).result()


def _step_back() -> None:
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)


def _rounds(peers: list[socket.socket], pause: float, rounds: int) -> float:
    poller, by_descriptor = select.poll(), {peer.fileno(): peer for peer in peers}
    for peer in peers:
        poller.register(peer, select.POLLIN)
    query, partial, times = bytes(QUERY_BYTES), bytearray(PARTIAL_BYTES), []
    for _ in range(rounds):
        resume = time.perf_counter() + pause
        while time.perf_counter() < resume:
            pass
        began, missing = time.perf_counter(), len(peers)
        for peer in peers:
            peer.sendall(query)
        while missing:
            for descriptor, _ in poller.poll():
                by_descriptor[descriptor].recv_into(partial, PARTIAL_BYTES, socket.MSG_WAITALL)
                missing -= 1
        times.append(time.perf_counter() - began)
    return statistics.median(times) * 1e6


def fan_out(folder: str, options: argparse.Namespace, holders: list[int]) -> list[dict[str, Any]]:
    """Additional cost of a layer with holders in their own processes, compared with attention at the home alone."""
    steps, layers = options.new // 3, options.layers
    most, blocks = max(holders), (CONTEXT + steps) // BLOCK_TOKENS + 1
    with Fleet(folder, options.channel, most, blocks) as fleet, Floor(options.channel, most) as floor:
        counts, turns, floors = [0, *holders], [], []
        for count in counts:
            fleet.decode(steps, CONTEXT, count)  # warm-up
        for _ in range(options.repeat):
            turns.append({count: fleet.decode(steps, CONTEXT, count) for count in counts})
            local, _ = turns[-1][0]
            pause = local.seconds / steps / layers * 1e6
            floors.append({count: floor.us(count, pause) for count in holders})
    found = []
    for count in holders:
        layers_run = steps * layers
        added = [(turn[count][0].seconds - turn[0][0].seconds) / layers_run * 1e6 for turn in turns]
        thread = [(turn[count][1] - turn[0][1]) / layers_run * 1e6 for turn in turns]
        floor_us, per_layer = statistics.median(one[count] for one in floors), statistics.median(added)
        found.append(
            {
                "holders": count,
                "per_layer_us": round(per_layer, 1),
                "home_thread_us": round(statistics.median(thread), 1),
                "floor_us": round(floor_us, 1),
                "ratio_to_floor": round(per_layer / floor_us, 2),
            }
        )
    return found


def _work(*_: Any) -> bytes:
    return bytes(PARTIAL_BYTES)


def scheduler_graph_ms(client: Client, layers: int, repeat: int) -> float:
    """Median time of one step as a Dask graph: for each layer a task at the home and one at the holder."""
    home, holder = sorted(client.scheduler_info()["workers"])[:2]
    times = []
    for step in range(repeat):
        began, last = time.perf_counter(), None
        for layer in range(layers):
            query = client.submit(_work, last, key=f"query-{step}-{layer}", workers=[home])
            partial = client.submit(_work, query, key=f"partial-{step}-{layer}", workers=[holder])
            last = client.submit(_work, query, partial, key=f"merge-{step}-{layer}", workers=[home])
        assert last is not None
        last.result()
        times.append(time.perf_counter() - began)
    return statistics.median(times) * 1e3


def engines(folder: str, options: argparse.Namespace) -> tuple[list[tuple[dict[str, float], ...]], float, float]:
    """Turns of two engines (all KV at home, and one block elsewhere), the floor, and the step as a Dask graph."""
    block_bytes = options.layers * 2 * KV_HEADS * BLOCK * HEAD_DIM * 2
    common: dict[str, Any] = {
        "dtype": "bfloat16", "block_tokens": BLOCK, "window_steps": 16, "channel": options.channel,
        "prefix_cache": False,
    }  # fmt: skip
    blocks = CONTEXT // BLOCK
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
        Client(cluster) as client,
    ):
        with (
            Engine(client, folder, kv_memory=blocks * block_bytes, **common) as all_local,
            Engine(client, folder, kv_memory=(blocks - 1) * block_bytes, **common) as one_remote,
            Floor(options.channel, 1) as floor,
        ):
            both = all_local, one_remote
            for engine in both:
                decode(engine, options.new)  # warm-up
            turns, floors = [], []
            for _ in range(options.repeat):
                turns.append(tuple(decode(engine, options.new) for engine in both))
                floors.append(floor.us(1, turns[-1][0]["step_ms"] / options.layers * 1e3))
        return turns, statistics.median(floors), scheduler_graph_ms(client, options.layers, 3)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--layers", type=int, default=30)
    arguments.add_argument("--new", type=int, default=96, help="decode steps of one turn")
    arguments.add_argument("--repeat", type=int, default=7, help="turns")
    arguments.add_argument("--channel", choices=["tcp", "unix", "ucx"], default="tcp", help="kind of channel")
    arguments.add_argument("--holders", default="", help="numbers of holders to measure the fan-out for: 1,4,16")
    options = arguments.parse_args()
    counts = [int(count) for count in options.holders.split(",") if count]
    with tempfile.TemporaryDirectory() as folder:
        save_model(options.layers, Path(folder))
        turns, floor, graph_ms = engines(folder, options)
        fan = fan_out(folder, options, counts) if counts else []
    assert all(local["holders"] == 0 and remote["holders"] == 1 for local, remote in turns)
    added = statistics.median(remote["step_ms"] - local["step_ms"] for local, remote in turns)
    per_layer = added / options.layers * 1e3
    figures = {
        "channel": options.channel,
        "holders": 1,
        "layers": options.layers,
        "local_step_ms": statistics.median(local["step_ms"] for local, _ in turns),
        "remote_step_ms": statistics.median(remote["step_ms"] for _, remote in turns),
        "per_step_ms": added,
        "per_layer_us": per_layer,
        "waiting_ms": statistics.median(remote["waiting_ms"] for _, remote in turns),
        "window_gap_ms": statistics.median(remote["gap_ms"] for _, remote in turns),
        "scheduler_graph_step_ms": graph_ms,
        "floor_us": floor,
        "ratio_to_floor": per_layer / floor,
        "graph_over_channel": graph_ms / added,
        "fan_out": fan,
    }
    configuration = {
        "context": CONTEXT,
        "block_tokens": BLOCK,
        "new": options.new,
        "repeat": options.repeat,
        "batch": 1,
    }
    report(figures, configuration, options.json)


if __name__ == "__main__":
    main()
