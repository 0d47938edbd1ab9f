"""How much faster are plain requests on one long text, one after the other, with the prefix cache?

No document is ingested: each request is the whole text and another question, through ``engine.generate``.
``seconds_cached`` is the time of all requests with the cache, including the first one; ``seconds_uncached`` is the time
without it, extrapolated from ``--uncached`` requests. The peer is plain transformers on as many threads as the workers
have together: with a forward over the whole prompt of each request (``peer_uncached_seconds``), and with a copy of the
text's cache for each (``peer_cached_seconds``); both are extrapolated from ``--peer`` requests. The model is
SmolLM2-135M in bfloat16, and answers are greedy.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

from _report import parser, report
from distributed import Client, LocalCluster
from questions_per_document import peer, prompts

from distkv_dask import Completion, Engine, SamplingParams


def ours(options: Any, cached: bool, count: int) -> tuple[list[float], list[Completion], list[int], list[list[int]]]:
    """Seconds of each request, the answers, the text and the questions."""
    sampling = SamplingParams(max_new_tokens=options.new, ignore_eos=True)
    settings = {"dtype": "bfloat16", "kv_memory": options.kv_memory, "prefix_cache": cached}
    with (
        LocalCluster(n_workers=options.workers, threads_per_worker=options.threads, dashboard_address=None) as cluster,
        Client(cluster) as client,
        Engine(client, "smollm2-135m", **settings) as engine,
    ):
        text, questions = prompts(engine, options.tokens, options.requests)
        engine.generate([[1] * 100] * options.workers, SamplingParams(max_new_tokens=2))  # warm-up
        times, answers = [], []
        for question in questions[:count]:
            began = time.perf_counter()
            answers += engine.generate([text + question], sampling)
            times.append(time.perf_counter() - began)
    assert all(len(one.token_ids) == options.new for one in answers), answers
    return times, answers, text, questions


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--requests", type=int, default=8)
    arguments.add_argument("--uncached", type=int, default=2, help="number of requests measured without the cache")
    arguments.add_argument("--peer", type=int, default=1, help="number of requests measured with the peer; 0: no peer")
    arguments.add_argument("--tokens", type=int, default=4000)
    arguments.add_argument("--new", type=int, default=32)
    arguments.add_argument("--workers", type=int, default=1)
    arguments.add_argument("--threads", type=int, default=2, help="threads of each worker")
    arguments.add_argument("--kv-memory", default="512 MiB", help="per worker")
    options = arguments.parse_args()
    times, answers, text, questions = ours(options, True, options.requests)
    without, plain, _, _ = ours(options, False, options.uncached)
    found: dict[str, Any] = {
        "seconds_cached": sum(times),
        "seconds_first": times[0],
        "seconds_later": statistics.median(times[1:]),
        "seconds_uncached": statistics.mean(without) * options.requests,
        "reused_tokens": [one.reused_tokens for one in answers],
        "same_tokens": sum(
            a == b for one, other in zip(answers, plain, strict=False)
            for a, b in zip(one.token_ids, other.token_ids, strict=True)
        ) / (options.uncached * options.new),
    }  # fmt: skip
    found["ratio"] = found["seconds_uncached"] / found["seconds_cached"]
    found["ratio_later"] = statistics.mean(without) / found["seconds_later"]
    if options.peer:
        options.questions = options.requests
        found["peer_uncached_seconds"], found["peer_cached_seconds"] = peer(text, questions, options)
        found["times_faster_than_transformers"] = found["peer_uncached_seconds"] / found["seconds_cached"]
        found["times_faster_than_transformers_caching"] = found["peer_cached_seconds"] / found["seconds_cached"]
    names = ("requests", "uncached", "peer", "tokens", "new", "workers", "threads", "kv_memory")
    report(found, {name: getattr(options, name) for name in names}, options.json)


if __name__ == "__main__":
    main()
