"""How do decode steps and prefill chunks divide into computing, waiting and sending, and what does a trace cost?

SmolLM2-135M on two workers of one thread; half of a document's KV is at its home and half on the other worker. Two
engines, one with a trace and one without, are open and take turns: the trace shows how time is divided, and the
difference between the engines is its cost.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from _placement import place_by
from _report import parser, report
from _trace import Lanes, Timed, during, read_trace
from distributed import Client, LocalCluster

from distkv_dask import Engine, SamplingParams


def shares(lanes: Lanes, home: str, frames: list[Timed]) -> dict[str, dict[str, float]]:
    """Mean ms of each kind of span within ``frames``, in the home's lane and in the holder's."""
    found: dict[str, dict[str, float]] = {}
    for (worker, lane), spans in lanes.items():
        if (worker == home) != (lane == "home lane"):
            continue
        sums: dict[str, float] = {}
        for frame in frames:
            for one in during(spans, frame):
                name = f"{one.category}: {one.name}"
                sums[name] = sums.get(name, 0.0) + one.ms / len(frames)
        found[f"{'home' if worker == home else 'holder'}, {lane}"] = {
            name: round(ms, 3) for name, ms in sorted(sums.items())
        }
    return found


def decode_ms(engine: Engine, prompt: list[int], new: int) -> tuple[float, str]:
    """Milliseconds of a decode step, and the home."""
    before = engine.status().totals
    done = engine.submit(prompt, SamplingParams(max_new_tokens=new, ignore_eos=True)).result()
    after = engine.status().totals
    seconds, steps = (after[name] - before.get(name, 0) for name in ("decode_seconds", "decode_steps"))
    return seconds / steps * 1e3, done.placement[-1].worker


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--tokens", type=int, default=4096, help="tokens of the document")
    arguments.add_argument("--new", type=int, default=32)
    arguments.add_argument("--repeat", type=int, default=3, help="turns")
    arguments.add_argument("--trace", type=Path, metavar="FILE", help="keep the trace")
    options = arguments.parse_args()
    place_by(lambda tokens: [(1, options.tokens // 2), (0, None)])
    settings: dict[str, Any] = {"dtype": "bfloat16", "kv_memory": "128 MiB", "prefix_cache": False}
    with (
        tempfile.TemporaryDirectory() as folder,
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
        Client(cluster) as client,
    ):
        file = options.trace or Path(folder) / "trace.json"
        with (
            Engine(client, "smollm2-135m", trace=str(file), **settings) as traced,
            Engine(client, "smollm2-135m", **settings) as plain,
        ):
            ids = plain.tokenizer.encode("\n".join(topics[name] for name in sorted(topics)))
            document = ids[: options.tokens]
            turns = [
                (decode_ms(traced, document, options.new), decode_ms(plain, document, options.new))
                for _ in range(options.repeat)
            ]
        lanes = read_trace(file)
    home = turns[0][0][1]
    steps = [one for one in lanes[home, "home lane"] if one.name == "step" and one.step > 1]
    last = [one for one in lanes[home, "home lane"] if one.name == "chunk"]
    chunks = [one for one in last if one.ms > 0.5 * max(each.ms for each in last)]
    figures = {
        "step_ms": statistics.mean(one.ms for one in steps),
        "step": shares(lanes, home, steps),
        "chunk_ms": statistics.mean(one.ms for one in chunks),
        "chunk": shares(lanes, home, chunks),
        "traced_step_ms": statistics.median(with_it for (with_it, _), _ in turns),
        "untraced_step_ms": statistics.median(without for _, (without, _) in turns),
    }
    configuration = {name: getattr(options, name) for name in ("tokens", "new", "repeat")} | {"workers": 2} | settings
    report(figures, configuration, options.json)


if __name__ == "__main__":
    main()
