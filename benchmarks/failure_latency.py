"""A holder is killed, freezes or sends garbage: how soon does its gang end, and the client get an error or a token?

A tiny model on worker processes decodes one sequence with part of its KV on another worker. ``gang`` is the time until
the gManager knows that the gang failed. ``client`` is the time until the request's future raises or, if a worker was
killed, until its next token: the KV of its prompt and tokens is recomputed on two of the other workers. A gang that
fails for a reason other than a worker's death is retried twice before its request fails.
"""

from __future__ import annotations

import os
import signal
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from _placement import place_by
from _report import parser, report
from distributed import Client, LocalCluster
from step_overhead import save_model

from distkv_dask import Engine, SamplingParams
from distkv_dask.client.session.generation import Generation

LAYERS, PROMPT, WORKERS = 4, 256, 3


def _send_garbage(begin: bool) -> None:
    """Answer every question with bytes that are not a frame, or with partials again; runs on the holder."""
    from distkv_dask.worker.holder import session
    from distkv_dask.worker.holder.native_turns import new_turns

    kind: Any = session.Session  # kept in the module, because this function is sent again for each call
    kind.sound = getattr(kind, "sound", kind._reply_to)
    vars(session)["new_turns"] = (lambda *_: None) if begin else new_turns  # C++ would answer by itself
    garbage: Any = lambda session, inlet, header: inlet._sock.send(b"\xff" * 5000)  # noqa: E731
    kind._reply_to = garbage if begin else kind.sound


class Trouble:
    """Faults of a worker, and how they are undone."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self.began = 0.0

    def kill(self, worker: str) -> Callable[[], object]:
        process = self._pid(worker)
        self.began = time.time()
        os.kill(process, signal.SIGKILL)
        return lambda: self._client.wait_for_workers(WORKERS)

    def freeze(self, worker: str) -> Callable[[], object]:
        process = self._pid(worker)
        self.began = time.time()
        os.kill(process, signal.SIGSTOP)
        return lambda: os.kill(process, signal.SIGCONT)

    def garble(self, worker: str) -> Callable[[], object]:
        self.began = time.time()
        self._client.run(_send_garbage, True, workers=[worker])
        return lambda: self._client.run(_send_garbage, False, workers=[worker])

    def _pid(self, worker: str) -> int:
        return int(self._client.run(os.getpid, workers=[worker])[worker])


def goes_on(engine: Engine, running: Generation, repairs: int, seconds: float = 60.0) -> str:
    """Wait until a request fails, or continues after more than ``repairs`` repairs, and say which."""
    deadline = time.monotonic() + seconds
    before = None
    while time.monotonic() < deadline:
        if running.done():
            error = running.exception()
            return f"{type(error).__name__}: {error}"
        status = engine.status()
        generated = sum(one.generated_tokens for one in status.sequences.values())
        if status.totals.get("repair_events", 0) > repairs:
            before = generated if before is None else before
            if generated > before:
                running.cancel()
                return "none: it continues"
        time.sleep(0.005)
    raise SystemExit("nothing happened")


def once(
    client: Client, engine: Engine, trouble: Trouble, cause: Callable[[str], Callable[[], object]]
) -> dict[str, Any]:
    """Seconds to the gang's end and to the client's error or next token, and that error."""
    running = engine.submit([1] * PROMPT, SamplingParams(max_new_tokens=4000, ignore_eos=True))
    while not (found := engine.status().sequences) or next(iter(found.values())).generated_tokens < 20:
        if running.done():
            raise SystemExit(f"the request ended before the fault: {running.exception()}")
        time.sleep(0.02)
    holder = next(iter(found.values())).placement[0].worker
    seen = len(client.get_events("distkv"))
    repairs = engine.status().totals.get("repair_events", 0)
    undo = cause(holder)
    try:
        kind = goes_on(engine, running, repairs)
        client_seconds = time.time() - trouble.began
    finally:
        undo()
    while len((status := engine.status()).workers) < WORKERS or status.sequences:  # until everything is as before
        time.sleep(0.1)
    events = client.get_events("distkv")[seen:]
    failed = [at - trouble.began for at, event in events if event.get("action") == "gang-failed"]
    gang = [seconds for seconds in failed if seconds <= client_seconds]
    return {"client": client_seconds, "gang": gang[0] if gang else client_seconds, "attempts": len(gang), "error": kind}


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--repeat", type=int, default=3)
    arguments.add_argument("--receive", type=float, default=1.0, help="distkv.timeouts.receive, seconds")
    arguments.add_argument("--start", type=float, default=2.0, help="distkv.timeouts.start, seconds")
    options = arguments.parse_args()
    place_by(lambda tokens: [(1, PROMPT // 2), (0, None)])
    figures = {}
    with (
        tempfile.TemporaryDirectory() as folder,
        LocalCluster(n_workers=WORKERS, threads_per_worker=1, dashboard_address=None) as cluster,
        Client(cluster) as client,
    ):
        save_model(LAYERS, Path(folder))
        with Engine(
            client,
            folder,
            kv_memory="32 MiB",
            prefix_cache=False,
            timeout_receive=options.receive,
            timeout_start=options.start,
        ) as engine:
            trouble = Trouble(client)
            for name, cause in (("garbage", trouble.garble), ("frozen", trouble.freeze), ("killed", trouble.kill)):
                runs = [once(client, engine, trouble, cause) for _ in range(options.repeat)]
                figures[name] = {
                    "gang_s": round(statistics.median(run["gang"] for run in runs), 3),
                    "client_s": round(statistics.median(run["client"] for run in runs), 3),
                    "client_s_worst": round(max(run["client"] for run in runs), 3),
                    "gangs_failed": runs[0]["attempts"],
                    "error": runs[0]["error"],
                }
    report(
        figures,
        {"repeat": options.repeat, "receive": options.receive, "start": options.start, "layers": LAYERS},
        options.json,
    )


if __name__ == "__main__":
    main()
