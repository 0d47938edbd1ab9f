"""One run: a cluster, an engine, its users, the faults, and the audit afterwards."""

from __future__ import annotations

import logging
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dask.config
from distributed import Client, LocalCluster

from _chaos.audit import Addresses, cluster_leaks, engine_leaks, file_leaks, own_leaks, running, settled
from _chaos.certificates import Certificates
from _chaos.faults import ENOUGH, Faults
from _chaos.load import Load
from _chaos.machines import Machines
from _chaos.network import HERE
from _chaos.questions import Questions
from _chaos.records import Record, Records
from _chaos.relay import Relays
from _chaos.schedule import Fault, plan_faults, settings
from distkv_dask import Engine
from distkv_dask.scheduler.gmanager import GManager

ENGINE: dict[str, Any] = {
    "dtype": "float32",
    "kv_memory": "1280 KiB",
    "block_tokens": 8,
    "move_tokens_per_step": 4,
    "performance": "preset",
    "timeout_drain": 20,
}
ROOM = 416
"""Tokens that a worker has memory for."""

PATIENCE = 75.0
"""Seconds after the last fault within which every request must end."""


@dataclass(frozen=True)
class Setting:
    """Settings of a run.

    Parameters
    ----------
    seed
        Decides prompts, load and faults.
    seconds, every
        How long faults are injected, and the average time between two of them.
    users
        How many users send requests at the same time.
    cuttable
        Whether this process is in its own network namespace; otherwise relays cut channels between workers.
    few
        Use only as many different prompts as a short run needs.
    tls
        Whether the cluster has certificates.
    """

    seed: int
    seconds: float
    every: float
    users: int
    cuttable: bool
    few: bool = False
    tls: bool = False


def run(model: Path, setting: Setting) -> dict[str, Any]:
    """Run it; returns the figures, and details of everything that went wrong."""
    questions = Questions(model, setting.seed, ROOM, setting.few)
    plan = plan_faults(setting.seed, setting.seconds, setting.every)
    folder = Path(tempfile.mkdtemp(prefix="distkv-chaos-"))
    (folder / "logs").mkdir()
    handler = _log_to(folder / "logs" / "scheduler.log")
    host = HERE if setting.cuttable else "127.0.0.1"
    certificates = Certificates(folder) if setting.tls else None
    speaks: dict[str, Any] = {}
    if certificates is not None:
        speaks = {"security": certificates.security, "protocol": "tls://"}
    try:
        with (
            dask.config.set({"distributed.scheduler.allowed-failures": 10}),
            LocalCluster(n_workers=0, host=host, dashboard_address=None, **speaks) as cluster,
            Client(cluster) as client,
        ):
            chaos = Chaos(cluster, client, folder, setting, certificates)
            figures = chaos.happen(model, questions, plan)
            chaos.machines_left()
        chaos.leaked += settled(lambda: own_leaks(), 10)
        chaos.leaked += file_leaks(folder)
    finally:
        logging.getLogger("distributed").removeHandler(handler)
    figures |= {"leaks": len(chaos.leaked), "leaked": chaos.leaked}
    trouble = any(figures[one] for one in ("wrong", "failed", "lost", "hung", "leaks"))
    if not trouble:
        shutil.rmtree(folder)
    return figures | {"logs": str(folder) if trouble else None}


def _log_to(file: Path) -> logging.Handler:
    handler = logging.FileHandler(file)
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
    logger = logging.getLogger("distributed")
    logger.handlers[:] = [handler]
    logger.propagate = False
    return handler


class Chaos:
    """A cluster under load and faults.

    Parameters
    ----------
    cluster, client
        A cluster that has no workers yet, and its client.
    folder
        Folder for logs and files.
    setting
        Settings of the run.
    certificates
        Those of the cluster, if it has any.
    """

    def __init__(
        self,
        cluster: LocalCluster,
        client: Client,
        folder: Path,
        setting: Setting,
        certificates: Certificates | None,
    ) -> None:
        self._client = client
        self._scheduler: Any = cluster.scheduler
        self._folder = folder
        self._setting = setting
        options = [] if certificates is None else certificates.options
        self._machines = Machines([cluster.scheduler_address, *options], folder, setting.cuttable)
        self._files = [] if certificates is None else certificates.files
        self._addresses = Addresses(self._scheduler)
        self.leaked: list[str] = []

    def happen(self, model: Path, questions: Questions, plan: Sequence[Fault]) -> dict[str, Any]:
        """Open an engine, run the users and the faults, and check what is left."""
        for workers in (2, 1, 1):  # two on one machine are cut off together, and use a Unix socket
            self._machines.start(workers)
        self._client.wait_for_workers(4, timeout=120)
        if not self._setting.cuttable:
            self._client.register_plugin(GManager())
            self._machines.relays = Relays(self._scheduler)
        engine = Engine(self._client, str(model), **ENGINE, **settings(self._setting.seed))
        state = self._scheduler.plugins["distkv"].engines[engine.id]
        records = Records()
        load = Load(engine, questions, records, self._folder / "saved")
        load.start(self._setting.seed, self._setting.users)
        faults = Faults(self._machines, self._client, self._scheduler, state, load, self._files)
        records.began = time.monotonic()
        for fault in plan:
            self._sleep_until(fault.at, records)
            faults.carry_out(fault)
        self._sleep_until(self._setting.seconds, records)
        load.stop()
        faults.heal(60)
        self._wait(load)
        unended = [self._judge(one, engine, state, records) for one in records.open()]
        snapshot = _snapshot(state) if unended else {}
        if unended:
            for machine in self._machines.up():
                machine.tell()
        if not unended:
            load.release()
            self.leaked += settled(lambda: engine_leaks(self._client, state))
        totals = engine.status().totals
        engine.close()
        self._addresses.look()
        self.leaked += settled(lambda: cluster_leaks(self._client, self._scheduler, self._addresses.known))
        return _figures(records, faults, plan) | {"totals": totals, "snapshot": snapshot}

    def machines_left(self) -> None:
        """End all machines; processes that do not end are leaks."""
        if self._machines.relays is not None:
            self._machines.relays.close()
        self.leaked += [f"process {one.pid}: {' '.join(one.cmdline())[:100]}" for one in self._machines.stop()]

    def _sleep_until(self, at: float, records: Records) -> None:
        while records.now() < at:
            time.sleep(min(0.2, max(0.0, at - records.now())))
            self._addresses.look()

    def _wait(self, load: Load) -> None:
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline and not (load.is_over() and running(self._scheduler) >= ENOUGH):
            time.sleep(0.2)
            self._addresses.look()

    def _judge(self, record: Record, engine: Engine, state: Any, records: Records) -> Record:
        """A request that has not ended: hung if the engine knows it, lost if it does not."""
        live = state.life.requests.get(record.number) if record.number is not None else None
        known = record.number is None or live is not None
        records.end(record, "hung" if known else "lost", f"live: {live}" if live is not None else "")
        return record


def _snapshot(state: Any) -> dict[str, Any]:
    """The engine's state when something hangs."""
    status = state.status()
    live = {number: repr(one)[:2000] for number, one in state.life.requests.items()}
    queue = [repr(one) for one in state.life.queue]
    chains = {home: repr(list(chain.gangs()))[:2000] for home, chain in state.life.chains.items()}
    return {"status": repr(status)[:20000], "live": live, "queue": queue, "chains": chains}


def _figures(records: Records, faults: Faults, plan: Sequence[Fault]) -> dict[str, Any]:
    count = records.count()
    outcomes = "completed", "cancelled", "wrong", "failed", "failed_legitimately", "lost", "hung"
    bad = [one for one in records.all if one.outcome in ("wrong", "failed", "lost", "hung")]
    return {
        "requests": len(records.all),
        **{one: count[one] for one in outcomes},
        "faults": dict(faults.count.most_common()),
        "faults_in_all": faults.count.total(),
        "anomalies": [
            one.words() | {"faults": [was for was in faults.done if one.began - 5 <= was["at"] <= (one.ended or 1e9)]}
            for one in bad
        ],
        "legitimate": [one.words() for one in records.all if one.outcome == "failed_legitimately"],
        "happened": faults.done,
        "plan": [list(one) for one in plan],
    }
