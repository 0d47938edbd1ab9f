"""What does a remote holder add to a decode step, over the same attention done locally?

A model of the asked number of layers with SmolLM2's attention (9 heads, 3 KV heads, head dim 64) and next to nothing
else decodes one sequence, now with all KV at its home, now with one block of it on another worker; engines for both are
open on the same cluster and take turns, and the median of the differences is the answer. Beside it: the floor, a bare
socket ping-pong of the same bytes between two processes, and the cost of the same step as a Dask graph of one task per
layer and holder.
"""

from __future__ import annotations

import multiprocessing
import socket
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from _report import parser, report
from distributed import Client, LocalCluster

from distkv_dask import Engine, SamplingParams

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
    """Decode one sequence; milliseconds of a step, of its waiting, and of the gap between windows."""
    before = engine.status()["totals"]
    completion = engine.submit([1] * (CONTEXT - new), SamplingParams(max_new_tokens=new, ignore_eos=True)).result()
    after = engine.status()["totals"]
    gained = {name: after[name] - before.get(name, 0) for name in after}
    return {
        "holders": len(completion.placement) - 1,
        "step_ms": gained["decode_seconds"] / gained["decode_steps"] * 1e3,
        "waiting_ms": gained["waiting_seconds"] / gained["decode_steps"] * 1e3,
        "gap_ms": gained["gap_seconds"] / (gained["windows"] - 1) * 1e3,
    }


def _pong(port: int, rounds: int) -> None:
    with socket.create_connection(("127.0.0.1", port)) as peer:
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        query, partial = bytearray(QUERY_BYTES), bytes(PARTIAL_BYTES)
        for _ in range(rounds):
            peer.recv_into(query, QUERY_BYTES, socket.MSG_WAITALL)
            peer.sendall(partial)


def floor_us(rounds: int = 5000) -> float:
    """Median round trip of one layer's bytes over a bare socket between two processes."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        process = multiprocessing.get_context("spawn").Process(target=_pong, args=(server.getsockname()[1], rounds))
        process.start()
        peer, _ = server.accept()
        with peer:
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            query, partial, times = bytes(QUERY_BYTES), bytearray(PARTIAL_BYTES), []
            for _ in range(rounds):
                began = time.perf_counter()
                peer.sendall(query)
                peer.recv_into(partial, PARTIAL_BYTES, socket.MSG_WAITALL)
                times.append(time.perf_counter() - began)
        process.join()
    return statistics.median(times) * 1e6


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


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--layers", type=int, default=30)
    arguments.add_argument("--new", type=int, default=192, help="decode steps of one turn")
    arguments.add_argument("--repeat", type=int, default=9, help="turns")
    arguments.add_argument("--channel", choices=["tcp", "unix", "ucx"], default="tcp", help="kind of channel")
    options = arguments.parse_args()
    block_bytes = options.layers * 2 * KV_HEADS * BLOCK * HEAD_DIM * 2
    with (
        tempfile.TemporaryDirectory() as folder,
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
        Client(cluster) as client,
    ):
        save_model(options.layers, Path(folder))
        common: dict[str, Any] = {
            "dtype": "bfloat16", "block_tokens": BLOCK, "window_steps": 16, "channel": options.channel
        }  # fmt: skip
        blocks = CONTEXT // BLOCK
        with (
            Engine(client, folder, kv_memory=blocks * block_bytes, **common) as all_local,
            Engine(client, folder, kv_memory=(blocks - 1) * block_bytes, **common) as one_remote,
        ):
            decode(all_local, options.new), decode(one_remote, options.new)  # warm
            turns = [(decode(all_local, options.new), decode(one_remote, options.new)) for _ in range(options.repeat)]
        graph_ms = scheduler_graph_ms(client, options.layers, 3)
    floor = floor_us()
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
