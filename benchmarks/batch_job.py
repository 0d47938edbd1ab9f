"""A batch that is killed repeatedly: what do three killed clients and a killed worker cost, and are rows lost?

The same job runs twice on a cluster of processes on this machine: undisturbed, and with the client killed three times
and a worker once. Some of its rows are bad (null, white space, far too long). The peer answers some good rows with
plain transformers in the same run, with as many threads as the workers have together.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import transformers
from _report import parser, report
from distributed import Client, LocalCluster

from distkv_dask.models.gguf_cache import converted_weights
from distkv_dask.models.source import resolve_model

QUESTION = "What is this text about?"
KILLS = 3


def texts(rows: int, bad: int, characters: int) -> list[str | None]:
    """Pieces of Python's language reference, with bad rows spread among them."""
    whole = "\n".join(topics[name] for name in sorted(topics))
    pieces: list[str | None] = [
        f"Document {at}. {whole[at * 997 % (len(whole) - characters) :][:characters]}" for at in range(rows)
    ]
    for at in range(bad):
        pieces[at * rows // bad + 1] = (None, "  ", whole[:100_000])[at % 3]
    return pieces


def job(folder: Path, out: str, scheduler: str, options: Namespace) -> subprocess.Popen[bytes]:
    """Start the batch; the same command again continues it."""
    source = [str(folder / "in.parquet"), "--question", QUESTION, "--out", str(folder / out)]
    limits = ["--max-new-tokens", str(options.new), "--kv-memory", options.kv_memory, "--scheduler", scheduler]
    command = ["-m", "distkv_dask.client.cli", "run", *source, *limits]
    return subprocess.Popen([sys.executable, *command], stdout=subprocess.DEVNULL)


def finished(process: subprocess.Popen[bytes], seconds: float) -> None:
    """Wait for a batch's end; 3 is its exit status when some rows have errors."""
    if process.wait(seconds) not in (0, 3):
        raise SystemExit(f"the batch failed with exit status {process.returncode}")


def answered(out: Path) -> int:
    return pq.read_table(out, columns=["row"]).num_rows if out.exists() else 0


def killed_again_and_again(folder: Path, client: Client, options: Namespace) -> Iterator[str]:
    """Run the batch with kills after equal shares of the rows; yields who was killed."""
    victims = ["client"] * KILLS + ["worker"]
    scheduler = client.scheduler.address
    process = job(folder, "killed", scheduler, options)
    for number, victim in enumerate(victims, 1):
        deadline = time.monotonic() + options.limit
        while answered(folder / "killed") < options.rows * number // (len(victims) + 1):
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit("the batch ended, or stopped answering, before everything was killed")
            time.sleep(0.2)
        if victim == "client":
            process.kill()
            process.wait()
            process = job(folder, "killed", scheduler, options)
        else:
            os.kill(next(iter(client.run(os.getpid).values())), signal.SIGKILL)
        yield victim
    finished(process, options.limit)


def peer_seconds(prompts: list[str], options: Namespace) -> float:
    """Seconds that plain transformers needs for a row."""
    torch.set_num_threads(options.workers)
    source = resolve_model("smollm2-135m")
    folder = converted_weights(Path(source.location), "bfloat16")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    tokenizer = source.tokenizer()
    assert tokenizer is not None
    began = time.perf_counter()
    for prompt in prompts:
        chat = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        model.generate(**ids, max_new_tokens=options.new, do_sample=False)
    return (time.perf_counter() - began) / len(prompts)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--rows", type=int, default=200)
    arguments.add_argument("--bad", type=int, default=10)
    arguments.add_argument("--characters", type=int, default=1000, help="characters of a document")
    arguments.add_argument("--new", type=int, default=16)
    arguments.add_argument("--workers", type=int, default=2)
    arguments.add_argument("--kv-memory", default="128 MiB", help="per worker")
    arguments.add_argument("--limit", type=float, default=900, help="time limit of each part, in seconds")
    options = arguments.parse_args()
    sources = texts(options.rows, options.bad, options.characters)
    with (
        tempfile.TemporaryDirectory() as name,
        LocalCluster(n_workers=options.workers, threads_per_worker=1, dashboard_address=None) as cluster,
        Client(cluster) as client,
    ):
        folder = Path(name)
        pq.write_table(pa.table({"text": sources}), folder / "in.parquet")
        began = time.perf_counter()
        finished(job(folder, "undisturbed", client.scheduler.address, options), options.limit)
        undisturbed = time.perf_counter() - began
        began = time.perf_counter()
        victims = list(killed_again_and_again(folder, client, options))
        killed = time.perf_counter() - began
        tables = [pq.read_table(folder / out).sort_by("row") for out in ("undisturbed", "killed")]
    good = [text for text in sources if text and text.strip() and len(text) < 100_000]
    peer = peer_seconds([f"{text}\n\n{QUESTION}" for text in good[:4]], options)
    report(figures(tables, options, undisturbed, killed) | {
        "killed": victims,
        "peer_seconds_per_row": peer,
        "times_faster_than_transformers": peer * len(good) / undisturbed,
    }, {name: value for name, value in vars(options).items() if name != "json"}, options.json)  # fmt: skip


def figures(tables: list[pa.Table], options: Namespace, undisturbed: float, killed: float) -> dict[str, Any]:
    """Results of the two runs; bfloat16 answers may differ where batches were composed differently."""
    plain, again = (table.to_pylist() for table in tables)
    rows = [one["row"] for one in again]
    same = sum(a["answer"] == b["answer"] for a, b in zip(plain, again, strict=False))
    return {
        "rows_lost": options.rows - len(set(rows)),
        "rows_doubled": len(rows) - len(set(rows)),
        "error_rows": sum(one["error"] is not None for one in again),
        "seconds_undisturbed": undisturbed,
        "seconds_killed": killed,
        "ratio": killed / undisturbed,
        "tokens_per_second": sum((one["prompt_tokens"] or 0) + (one["new_tokens"] or 0) for one in plain) / undisturbed,
        "answers_equal": same / options.rows,
    }


if __name__ == "__main__":
    main()
