"""How long does a decoding home wait for a holder whose home lane is computing long prefill layers?

SmolLM2-135M on two workers of one thread. A sequence decodes at its home with half of its KV on the other worker, while
that worker prefills a document. A trace shows for each layer how long the home waited for partials, and how long the
holder took from the first byte of the query to the last byte of the answer (on the clock of the same machine).
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from pydoc_data.topics import topics

from _placement import place_by
from _report import parser, report
from _trace import Timed, read_trace
from distributed import Client, LocalCluster

from distkv_dask import Engine, SamplingParams

NEIGHBOUR = 6070
"""Tokens of the document that the holder prefills; only this document is placed entirely at the holder."""


def percentiles(values: list[float]) -> dict[str, float]:
    """Median, 99th percentile, mean and number."""
    cuts = statistics.quantiles(values, n=100)
    return {"p50_ms": round(cuts[49], 3), "p99_ms": round(cuts[98], 3), "mean_ms": round(statistics.fmean(values), 3),
            "layers": len(values)}  # fmt: skip


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--tokens", type=int, default=4096, help="tokens of the sequence that decodes")
    arguments.add_argument("--new", type=int, default=400, help="its decode steps")
    options = arguments.parse_args()
    place_by(lambda tokens: [(1, None)] if tokens > NEIGHBOUR else [(1, options.tokens // 2), (0, None)])
    with (
        tempfile.TemporaryDirectory() as folder,
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
        Client(cluster) as client,
    ):
        file = Path(folder) / "trace.json"
        with Engine(
            client, "smollm2-135m", dtype="bfloat16", kv_memory="256 MiB", trace=str(file), prefix_cache=False
        ) as engine:
            ids = engine.tokenizer.encode("\n".join(topics[name] for name in sorted(topics)))
            decoding = engine.submit(ids[: options.tokens], SamplingParams(max_new_tokens=options.new, ignore_eos=True))
            while not any(one.generated_tokens > options.new // 4 for one in engine.status().sequences.values()):
                time.sleep(0.1)
            neighbour = engine.submit(ids[-NEIGHBOUR:], SamplingParams(max_new_tokens=2, ignore_eos=True))
            home = decoding.result().placement[-1].worker
            holder = neighbour.result().placement[0].worker
        lanes = read_trace(file)
    prefills = [one for one in lanes[holder, "home lane"] if one.name == "forward" and one.ms > 200]

    def neighboured(one: Timed) -> bool:
        return any(one.within(prefill) for prefill in prefills)

    began = {(one.gang, one.step, one.layer): one for one in lanes[home, "home lane"] if one.name == "send"}
    ended = {(one.gang, one.step, one.layer): one for one in lanes[holder, "holder lane"] if one.name == "send"}
    waits = [one for one in lanes[home, "home lane"] if one.name == "wait" and (one.gang, one.step, one.layer) in ended]
    steps = [one for one in lanes[home, "home lane"] if one.name == "step"]
    decoded = [one for one in waits if one.began > steps[0].began]
    figures = {}
    for name, beside in (("beside_an_idle_home_lane", False), ("beside_prefill", True)):
        chosen = [one for one in decoded if neighboured(one) is beside]
        places = [(one.gang, one.step, one.layer) for one in chosen]
        figures[name] = {
            "wait": percentiles([one.ms for one in chosen]),
            "holder_answers": percentiles([ended[place].ended - began[place].began for place in places]),
            "step_ms": round(statistics.fmean(one.ms for one in steps if neighboured(one) is beside), 1)
            if any(neighboured(one) is beside for one in steps)
            else None,
        }
    figures["prefill_layer_ms"] = round(statistics.fmean(one.ms for one in prefills) / 30, 1)
    report(figures, {"tokens": options.tokens, "new": options.new, "neighbour": NEIGHBOUR, "batch": 1}, options.json)


if __name__ == "__main__":
    main()
