"""The main job on one machine: questions about documents whose KV cache fits on none of the workers."""

from __future__ import annotations

import time
from dataclasses import astuple
from pathlib import Path
from pydoc_data.topics import topics

import pyarrow as pa
import pyarrow.parquet as pq
from distributed import Client, LocalCluster
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from distkv_dask import Completion, Engine, SamplingParams

KV_MEMORY = "96 MiB"  # per worker
DOCUMENT_TOKENS = 4500
OUT = Path("demo-output/answers.parquet")
QUESTIONS = {
    "statements": (["compound"], "What does this document describe? Answer in two sentences."),
    "strings": (["string-methods"], "What is this document about? Answer in two sentences."),
    "attributes": (["assignment", "attribute-access"], "Summarize this document in two sentences."),
}
console = Console()


def cut(engine: Engine, names: list[str], tokens: int) -> str:
    """The first ``tokens`` tokens of some topics of Python's own language reference."""
    return engine.tokenizer.decode(engine.tokenizer.encode("\n".join(topics[name] for name in names))[:tokens])


def ask(engine: Engine) -> list[Completion]:
    """Submit one question for each document and follow the work until all answers are there."""
    futures = []
    for number, (sources, question) in enumerate(QUESTIONS.values()):
        document = cut(engine, sources, DOCUMENT_TOKENS + 500 * number)
        prompt = [{"role": "user", "content": f"{document}\n\n{question}"}]
        futures.append(engine.submit(prompt, SamplingParams(max_new_tokens=64)))
    columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("starting", total=None)
        while not all(future.done() for future in futures):
            live = engine.status().sequences.values()
            finished = sum(future.result().prompt_tokens for future in futures if future.done())
            progress.update(
                bar,
                description=", ".join(sorted(one.state for one in live)) or "done",
                completed=finished + sum(min(one.kv_tokens, one.prompt_tokens) for one in live),
                total=finished + sum(one.prompt_tokens for one in live),
            )
            time.sleep(0.2)
    return [future.result() for future in futures]


def show(answers: list[Completion], workers: list[str], total: float) -> None:
    """Print answers, where each document's blocks were, and speeds."""
    for (name, (_, question)), answer in zip(QUESTIONS.items(), answers, strict=True):
        console.print(f"\n[bold]{name}[/bold]: {question}\n[cyan]{answer.text.strip()}[/cyan]")
    columns = ["tokens", *(f"worker {number}" for number in range(len(workers))), "prefill/s", "decode/s"]
    table = Table("document", title="Tokens of KV on each worker, and tokens per second")
    for column in columns:
        table.add_column(column, justify="right")
    for name, answer in zip(QUESTIONS, answers, strict=True):
        held = {span.worker: span.tokens for span in answer.placement}
        table.add_row(
            name,
            str(answer.prompt_tokens),
            *(str(held.get(worker, "-")) for worker in workers),
            f"{answer.prompt_tokens / answer.timings.prefill:.0f}",
            f"{len(answer.token_ids) / answer.timings.decode:.1f}",
        )
    console.print("\n", table)
    tokens = sum(answer.prompt_tokens for answer in answers)
    console.print(f"{tokens} prompt tokens and all answers in {total:.0f} s: {tokens / total:.0f} tokens/s together")


def write(answers: list[Completion]) -> None:
    """Write the table of answers."""
    OUT.parent.mkdir(exist_ok=True)
    columns = {
        "document": list(QUESTIONS),
        "question": [question for _, question in QUESTIONS.values()],
        "answer": [answer.text for answer in answers],
        "prompt_tokens": [answer.prompt_tokens for answer in answers],
        "new_tokens": [len(answer.token_ids) for answer in answers],
        "finish_reason": [answer.finish_reason for answer in answers],
        "error": pa.array([answer.error for answer in answers], pa.string()),
        "seconds": [sum(astuple(answer.timings)) for answer in answers],
    }
    pq.write_table(pa.table(columns), OUT)


def main() -> None:
    """Run the demo."""
    console.print("Starting a Dask cluster of 3 worker processes ...")
    with LocalCluster(n_workers=3, threads_per_worker=1) as cluster, Client(cluster) as client:
        console.print(f"Dask dashboard: {client.dashboard_link}")
        console.print("Loading SmolLM2-135M-Instruct on every worker (a conversion the first time) ...")
        with Engine(client, model="smollm2-135m", dtype="bfloat16", kv_memory=KV_MEMORY) as engine:
            status = engine.status()
            workers = sorted(status.workers)
            room = status.workers[workers[0]].capacity_blocks * status.block_tokens
            console.print(f"Each worker has room for the KV of {room} tokens; no document below fits on one.")
            began = time.perf_counter()
            answers = ask(engine)
            total = time.perf_counter() - began
    show(answers, workers, total)
    write(answers)
    console.print(f"Answers written to {OUT}")


if __name__ == "__main__":
    main()
