"""How far is the time that a dry run predicts from that of the real run, for three kinds of batches?

Long documents with short answers (prefill), short prompts with long answers (decode), and documents with several
questions each, whose KV is shared. Workers are timed when the engine opens; all answers have their maximum length, as
the dry run assumes. On a busy machine this timing is outdated within seconds, so the time is predicted again from the
speed of the run's decode windows. For a large folder there is only a dry run.
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pyarrow as pa
from _report import parser, report
from distributed import Client, LocalCluster

from distkv_dask import Engine, SamplingParams

TEXT = "\n".join(topics[name] for name in sorted(topics))


def rows(count: int, characters: int) -> pa.Table:
    """Texts, no two of which begin alike."""
    return pa.table({"text": [f"Text {at}. {TEXT[at * 9973 % 300_000 :][:characters]}" for at in range(count)]})


MIXES: dict[str, tuple[int, int, int, int]] = {
    "long documents": (8, 7_000, 1, 8),
    "long answers": (48, 120, 1, 96),
    "six questions each": (4, 5_000, 6, 32),
}
"""Rows, characters of each, questions about each, tokens of an answer."""


def measure(engine: Engine, folder: Path, name: str) -> dict[str, Any]:
    """Predict a batch, run it, and compare."""
    count, characters, several, new = MIXES[name]
    asked = {"questions": [f"Question {at}: what is it about?" for at in range(several)]}
    sampling = SamplingParams(max_new_tokens=new, ignore_eos=True)
    found = engine.estimate(rows(count, characters), sampling=sampling, **asked)
    done = engine.process(rows(count, characters), sampling=sampling, out=folder / name, progress=False, **asked)
    afterwards = engine.estimate(rows(count, characters), sampling=sampling, **asked).seconds
    slower = {round(one.performance.slower, 2) for one in engine.status().workers.values()}
    return {
        "requests": found.requests, "prompt tokens": found.prompt_tokens, "new tokens": found.new_tokens,
        "predicted s": round(found.seconds, 1), "real s": round(done.seconds, 1),
        "predicted / real": round(found.seconds / done.seconds, 2),
        "by the speed seen in the run / real": round(afterwards / done.seconds, 2), "slower": sorted(slower),
    }  # fmt: skip


def main() -> None:
    """Run it."""
    arguments = parser(__doc__)
    arguments.add_argument("--documents", type=int, default=500)
    arguments.add_argument("--workers", type=int, default=2)
    options = arguments.parse_args()
    cluster = LocalCluster(n_workers=options.workers, threads_per_worker=1, dashboard_address=None)
    with tempfile.TemporaryDirectory() as name, cluster, Client(cluster) as client:
        folder = Path(name)
        with Engine(client, kv_memory="512 MiB", performance="measure") as engine:
            figures: dict[str, Any] = {mix: measure(engine, folder, mix) for mix in MIXES}
            texts = folder / "documents"
            texts.mkdir()
            for at in range(options.documents):
                (texts / f"{at}.txt").write_text(f"{at} {TEXT[at * 997 % 300_000 :][:20_000]}")
            began = time.monotonic()
            found = engine.estimate(texts, question="What is it about?")
            figures["counting"] = {"rows": found.rows, "tokens": found.prompt_tokens, "s": time.monotonic() - began}
    load = [round(one, 1) for one in os.getloadavg()]
    report(figures, {"model": "smollm2-135m", "workers": options.workers, "load": load}, options.json)


if __name__ == "__main__":
    main()
