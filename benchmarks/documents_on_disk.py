"""Documents that take turns in memory: what does a question cost if its document must be restored first?

KV memory has room for one of several documents. Questions go to the documents in turn: with KV on disk, with KV
recomputed (``spill=0``), and, as the floor, with room for all documents. The last part times an urgent request that
arrives while another one uses all the room: the other one is preempted (``urgent``) or finishes first (``equal``), and
its time is measured, too. The model is SmolLM2-135M in bfloat16; each worker has one thread.
"""

from __future__ import annotations

import time
from pydoc_data.topics import topics
from statistics import median

from _report import parser, report
from distributed import Client, LocalCluster

from distkv_dask import Engine, SamplingParams

ANSWER = SamplingParams(max_new_tokens=8, ignore_eos=True)


def in_turn(engine: Engine, texts: list[list[int]], question: list[int], turns: int) -> tuple[float, float, list[str]]:
    """Median seconds to ingest a document and to answer a question, and the answers."""
    ingests, asks, answers, documents = [], [], [], []
    for ids in texts:
        began = time.perf_counter()
        documents.append(engine.ingest(ids))
        ingests.append(time.perf_counter() - began)
    for _ in range(turns):
        for document in documents:
            began = time.perf_counter()
            answers.append(document.ask(question, ANSWER).text)
            asks.append(time.perf_counter() - began)
    for document in documents:
        document.release()
    return median(ingests), median(asks), answers


def preempted(engine: Engine, long: list[int], short: list[int], priority: int) -> tuple[float, float]:
    """Seconds of a short request that arrives while a long one uses all the room, and of the long one."""
    began = time.perf_counter()
    first = engine.submit(long, SamplingParams(max_new_tokens=192, ignore_eos=True))
    while not any(one.generated_tokens for one in engine.status().sequences.values()):
        time.sleep(0.05)
    came = time.perf_counter()
    engine.submit(short, SamplingParams(max_new_tokens=8, ignore_eos=True, priority=priority)).result(timeout=600)
    urgent = time.perf_counter() - came
    first.result(timeout=600)
    return urgent, time.perf_counter() - began


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--tokens", type=int, default=3000)
    arguments.add_argument("--documents", type=int, default=2)
    arguments.add_argument("--turns", type=int, default=3)
    arguments.add_argument("--workers", type=int, default=2)
    options = arguments.parse_args()
    figures: dict[str, float] = {}
    with (
        LocalCluster(n_workers=options.workers, threads_per_worker=1, dashboard_address=None) as cluster,
        Client(cluster) as client,
    ):
        said = {}
        for name, room, spill in (("disk", 1.3, "8 GiB"), ("anew", 1.3, 0), ("memory", 1.3 * options.documents, 0)):
            memory = int(room * options.tokens * 23040 / options.workers)
            settings = {"dtype": "bfloat16", "kv_memory": memory, "spill": spill, "prefix_cache": False}
            with Engine(client, "smollm2-135m", **settings) as engine:
                ids = engine.tokenizer.encode("\n".join(topics[one] for one in sorted(topics)))
                texts = [ids[at * options.tokens :][: options.tokens] for at in range(options.documents)]
                ingest, ask, said[name] = in_turn(engine, texts, ids[:20], options.turns)
                figures |= {f"{name}_ask_seconds": ask, "ingest_seconds": ingest}
                if name == "disk":
                    figures["document_mb"] = options.tokens * 23040 / 1e6
                    wide = ids[: int(0.8 * options.tokens)]
                    for way, priority in (("urgent", 1), ("equal", 0)):
                        figures[f"{way}_seconds"], figures[f"{way}_other_seconds"] = preempted(
                            engine, wide, ids[-options.tokens // 2 :], priority
                        )
    assert said["disk"] == said["anew"] == said["memory"], "answers differ"
    figures["anew_over_disk"] = figures["anew_ask_seconds"] / figures["disk_ask_seconds"]
    figures["disk_over_memory"] = figures["disk_ask_seconds"] / figures["memory_ask_seconds"]
    report(
        figures, {name: getattr(options, name) for name in ("tokens", "documents", "turns", "workers")}, options.json
    )


if __name__ == "__main__":
    main()
