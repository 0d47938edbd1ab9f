"""Our system: the workers of one cluster, with one engine that speculates and one that does not."""

from __future__ import annotations

import time
from contextlib import ExitStack
from typing import Any

from distributed import Client, LocalCluster

from distkv_dask import Completion, Engine, SamplingParams


class System:
    """Engines in a local cluster, each worker with ``pool_bytes`` of KV memory."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self._settings, self._open = settings, ExitStack()
        self._engines: dict[bool, Engine] = {}
        self.about = f"distkv-dask, {settings['workers']} workers x {settings['threads']} threads, bfloat16"

    def __enter__(self) -> System:
        workers, threads = self._settings["workers"], self._settings["threads"]
        cluster = LocalCluster(n_workers=workers, threads_per_worker=threads, dashboard_address=None)
        self._client = self._open.enter_context(Client(self._open.enter_context(cluster)))
        self._engine(speculate=False)
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def _engine(self, speculate: bool) -> Engine:
        if speculate not in self._engines:
            self._engines[speculate] = self._open.enter_context(
                Engine(
                    self._client, "smollm2-135m", dtype="bfloat16", kv_memory=self._settings["pool_bytes"],
                    prefix_cache=False, prefill_workers="auto", speculation="auto" if speculate else "off",
                )
            )  # fmt: skip
        return self._engines[speculate]

    def answer(self, prompts: list[list[int]], new: int, document: list[int], speculate: bool) -> dict[str, Any]:
        """Seconds in all, and until each answer's first and last token."""
        engine, sampling = self._engine(speculate), SamplingParams(max_new_tokens=new, ignore_eos=True)
        began, shared = time.perf_counter(), 0.0
        if document:
            with engine.ingest(document) as handle:
                shared = time.perf_counter() - began
                done = handle.ask(prompts, sampling)
        else:
            done = engine.generate(prompts, sampling)
        seconds = time.perf_counter() - began
        return {"seconds": seconds, "shared": shared, **_times(done, shared)}


def _times(done: list[Completion], shared: float) -> dict[str, Any]:
    for one in done:
        if one.error is not None:
            raise RuntimeError(one.error)
    firsts = [shared + one.timings.queued + one.timings.prefill for one in done]
    return {
        "firsts": firsts,
        "ends": [first + one.timings.decode for first, one in zip(firsts, done, strict=True)],
        "tokens": [one.token_ids for one in done],
    }
