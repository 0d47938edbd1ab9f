"""How much of a core does the Dask scheduler need for decode windows as the cluster grows?

A real scheduler, alone in its process, and real workers with lanes, pools, channels and gangs; only the model's forward
is replaced by a sleep as long as a decode step, so that dozens of workers fit on a few cores. Every request is larger
than a worker, so every home has holders. For each number of workers, windows first have a fixed length for streaming,
and then one within the scheduler's budget.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers
from _report import parser, report
from distributed import Client, Scheduler, Worker

from distkv_dask import Engine, SamplingParams
from distkv_dask.worker.model import load
from distkv_dask.worker.model.load import load_model
from distkv_dask.worker.model.loaded import LoadedModel

VOCAB, BLOCK, BLOCKS, NEW = 8, 64, 128, 4096
PROMPT = int(1.2 * BLOCK * BLOCKS) - NEW
BLOCK_BYTES = 2 * 1 * BLOCK * 8 * 4
WORKERS_PER_PROCESS = 13
"""Workers per process: importing torch takes seconds, but workers of one process share a lock when threads start."""
MODES = ("fixed", "budget")


class SleepingModel(LoadedModel):
    """A model whose forward takes as long as a real one and computes nothing."""

    def forward(self, token_ids: torch.Tensor, positions: Any, step: Any, keep: Any = None, *_: Any) -> torch.Tensor:
        """Return logits [n, vocab] of n tokens after the time of a step."""
        time.sleep(float(os.environ["STEP_SECONDS"]))
        return torch.zeros(len(token_ids if keep is None else keep), VOCAB)


def _load(name: str, dtype: str, threads: int, *_: Any, **__: Any) -> SleepingModel:
    real = load_model(name, dtype, threads)
    return SleepingModel(real._model, real.geometry, frozenset(), lambda: None, real.weights)


def run_scheduler(address: Any) -> None:
    """Run a scheduler; the main function of a process."""

    async def serve() -> None:
        async with Scheduler(host="127.0.0.1", port=0, dashboard=False) as scheduler:
            address.send(scheduler.address)
            await scheduler.finished()

    asyncio.run(serve())


def run_workers(scheduler: str, count: int, step_seconds: float) -> None:
    """Run workers; the main function of a process."""
    os.environ["STEP_SECONDS"] = str(step_seconds)
    load.load_model = _load  # type: ignore[assignment]

    async def serve() -> None:
        workers = [Worker(scheduler, nthreads=1, memory_limit=0, dashboard=False) for _ in range(count)]
        await asyncio.gather(*workers)
        await asyncio.gather(*(worker.finished() for worker in workers))

    asyncio.run(serve())


def save_model(folder: Path) -> None:
    """The smallest model that an engine opens."""
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=2 * PROMPT + NEW,
    )
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)


def measure(client: Client, scheduler: psutil.Process, model: str, workers: int, mode: str, options: Any) -> Any:
    """Open an engine, fill it, and measure the scheduler while all homes decode."""
    asked = options.asked
    windows: dict[str, Any] = {"window_stream_seconds": asked, "window_seconds": asked}
    if mode == "fixed":
        windows["window_max_seconds"] = asked
    with Engine(
        client,
        model,
        kv_memory=BLOCKS * BLOCK_BYTES,
        block_tokens=BLOCK,
        prefill_chunk_tokens=8192,
        prefix_cache=False,
        **windows,
    ) as engine:
        for _ in range(int(workers / 1.2)):
            engine.stream([1] * PROMPT, SamplingParams(max_new_tokens=NEW, ignore_eos=True))
        while any(one.state != "decode" for one in engine.status().sequences.values()):
            time.sleep(0.5)
        status = engine.status()
        time.sleep(options.settle)
        before, cpu, began = engine.status(), sum(scheduler.cpu_times()[:2]), time.perf_counter()
        time.sleep(options.seconds)
        after, cpu = engine.status(), sum(scheduler.cpu_times()[:2]) - cpu
        seconds = time.perf_counter() - began
    gained = {name: value - before.totals.get(name, 0) for name, value in after.totals.items()}
    homes = {one.home for one in status.sequences.values()}
    members = {(one.home, span.worker) for one in status.sequences.values() for span in one.placement}
    tasks = gained["windows"] * len(members) / len(homes)
    return {
        "workers": workers,
        "mode": mode,
        "homes": len(homes),
        "tasks_of_a_round": len(members),
        "tasks_per_second": tasks / seconds,
        "window_seconds": gained["decode_seconds"] / gained["windows"],
        "gap_ms": gained["gap_seconds"] / gained["windows"] * 1e3,
        "core_share": cpu / seconds,
        "cpu_ms_per_task": cpu / tasks * 1e3,
    }


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--workers", type=int, nargs="+", default=[5, 20, 50])
    arguments.add_argument("--asked", type=float, default=0.25, help="seconds between pieces of streamed text")
    arguments.add_argument("--step", type=float, default=0.02, help="seconds of a decode step")
    arguments.add_argument("--settle", type=float, default=6, help="seconds before measuring")
    arguments.add_argument("--seconds", type=float, default=10, help="seconds of a measurement")
    arguments.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    options = arguments.parse_args()
    context = multiprocessing.get_context("spawn")
    os.environ["DASK_LOGGING__DISTRIBUTED"] = "error"  # for the processes that are started from here on
    sizes = []
    with tempfile.TemporaryDirectory() as folder:
        save_model(Path(folder))
        for workers in options.workers:
            mine, theirs = context.Pipe()
            scheduler = context.Process(target=run_scheduler, args=(theirs,))
            scheduler.start()
            address = mine.recv()
            counts = [min(WORKERS_PER_PROCESS, workers - at) for at in range(0, workers, WORKERS_PER_PROCESS)]
            hosts = [context.Process(target=run_workers, args=(address, count, options.step)) for count in counts]
            for host in hosts:
                host.start()
            with Client(address) as client:
                client.wait_for_workers(workers, timeout=240)
                for mode in options.modes:
                    sizes.append(measure(client, psutil.Process(scheduler.pid), folder, workers, mode, options))
                    print(sizes[-1], flush=True)
                client.shutdown()
            for process in (*hosts, scheduler):
                process.join(30)
    configuration = {name: getattr(options, name) for name in ("asked", "step", "settle", "seconds")}
    report({"sizes": sizes}, configuration, options.json)


if __name__ == "__main__":
    main()
