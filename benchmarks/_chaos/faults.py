"""Faults, applied to whatever is running at that time."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from random import Random
from typing import Any

import psutil
from distributed import Client

from _chaos.load import Load
from _chaos.machines import Machine, Machines
from _chaos.schedule import Fault, picked
from distkv_dask.placement import Move
from distkv_dask.scheduler.engines.engine import EngineState
from distkv_dask.scheduler.lifecycle.events import Tick
from distkv_dask.scheduler.moves import migration

FEWEST, MOST, ENOUGH = 2, 6, 4
"""Numbers of workers: the minimum after a retirement, the maximum after a join, and the number at the end."""


class Faults:
    """Injects faults into a cluster and its engine.

    Parameters
    ----------
    machines, client, scheduler
        The cluster; the scheduler runs in this process.
    state
        The engine as the scheduler sees it.
    load
        The engine's users.
    certificates
        Files for clients in other processes, if the cluster uses TLS.
    """

    def __init__(
        self,
        machines: Machines,
        client: Client,
        scheduler: Any,
        state: EngineState,
        load: Load,
        certificates: Sequence[str] = (),
    ) -> None:
        self._certificates = certificates
        self._machines = machines
        self._client = client
        self._scheduler = scheduler
        self._state = state
        self._users = load
        self._lasting: list[threading.Thread] = []
        self.done: list[dict[str, Any]] = []
        """What was done, when, and to whom."""
        self.count: Counter[str] = Counter()

    def carry_out(self, fault: Fault) -> None:
        """Apply a fault now; undo it later if it lasts."""
        at = self._users.records.now()
        try:
            what = getattr(self, "_" + fault.kind.replace("-", "_"))(fault)
        except (OSError, psutil.Error) as error:  # it has already ended
            what = f"nothing: {error!r}"
        if not what.startswith("nothing"):
            self.count[fault.kind] += 1
        self.done.append({"at": round(at, 2), "kind": fault.kind, "what": what})

    def heal(self, limit: float) -> None:
        """Wait until all lasting faults are undone and there are enough workers again."""
        deadline = time.monotonic() + limit
        for thread in self._lasting:
            thread.join(max(0.0, deadline - time.monotonic()))
        time.sleep(2)  # nannies replace killed workers
        for _ in range(ENOUGH - len(self._machines.workers())):
            self._machines.start()

    def _later(self, seconds: float, undo: Callable[[], object]) -> None:
        def wait() -> None:
            time.sleep(seconds)
            with contextlib.suppress(OSError, psutil.Error):
                undo()

        self._beside(wait)

    def _beside(self, work: Callable[[], None]) -> None:
        thread = threading.Thread(target=work, daemon=True)
        self._lasting.append(thread)
        thread.start()

    # Processes

    def _some(self, fault: Fault, many: int = 1) -> list[tuple[Machine, psutil.Process]]:
        workers = self._machines.workers()
        Random(fault.pick).shuffle(workers)
        return workers[:many]

    def _kill(self, fault: Fault, many: int = 1) -> str:
        victims = self._some(fault, many)
        for _, process in victims:
            process.kill()
        return _names(victims)

    def _kill_several(self, fault: Fault) -> str:
        return self._kill(fault, 2)

    def _kill_machine(self, fault: Fault) -> str:
        machines = self._machines.up()
        if len(machines) < 2:
            return "nothing: it is the only machine"
        machine = picked(machines, fault.pick)
        machine.kill()
        self._later(fault.seconds, self._machines.start)
        return machine.name

    def _freeze(self, fault: Fault, many: int = 1) -> str:
        victims = self._some(fault, many)
        for _, process in victims:
            process.send_signal(signal.SIGSTOP)
            self._later(fault.seconds, lambda one=process: one.send_signal(signal.SIGCONT))  # type: ignore[misc]
        return f"{_names(victims)} for {fault.seconds:.1f} s"

    def _freeze_several(self, fault: Fault) -> str:
        return self._freeze(fault, 2)

    # Networks

    def _cut(self, fault: Fault) -> str:
        machine = picked(self._machines.up(), fault.pick)
        machine.link.cut(True)
        self._later(fault.seconds, lambda: machine.link.cut(False))
        return f"{machine.name} for {fault.seconds:.1f} s"

    def _cut_peers(self, fault: Fault) -> str:
        machines = self._machines.up()
        for machine in machines:
            with contextlib.suppress(OSError):  # it has just gone down
                machine.link.isolate(True)
                self._later(fault.seconds, lambda one=machine: one.link.isolate(False))  # type: ignore[misc]
        return f"{', '.join(one.name for one in machines)} for {fault.seconds:.1f} s"

    # Joins and retirements

    def _join(self, fault: Fault, many: int = 1) -> str:
        if len(self._machines.workers()) + many > MOST:
            return "nothing: there are enough workers"
        return ", ".join(self._machines.start().name for _ in range(many))

    def _scale_up(self, fault: Fault) -> str:
        return self._join(fault, 2)

    def _retire(self, fault: Fault, many: int = 1) -> str:
        there = sorted(self._scheduler.workers)
        if len(there) - many < FEWEST:
            return "nothing: there are too few workers"
        Random(fault.pick).shuffle(there)
        leaving = there[:many]
        self._beside(lambda: self._client.retire_workers(leaving, close_workers=True))
        return ", ".join(leaving)

    def _scale_down(self, fault: Fault) -> str:
        return self._retire(fault, 2)

    # The engine

    def _move(self, fault: Fault) -> str:
        async def start() -> str:
            life, manager = self._state.life, self._scheduler.plugins["distkv"]
            moves = list(self._moves())
            Random(fault.pick).shuffle(moves)
            for move in (move for move in moves if migration.can_start(life, move)):
                migration.start(life, move)
                manager.dispatcher.handle(self._state, Tick())  # carries out the commands that the move needs
                return f"tokens {move.start} to {move.stop} of {move.sequence}, {move.source} to {move.target}"
            return "nothing: no block can move"

        return asyncio.run_coroutine_threadsafe(start(), self._scheduler.loop.asyncio_loop).result(30)

    def _moves(self) -> Iterator[Move]:
        life = self._state.life
        for number, account in life.ledger.sequences.items():
            full = migration.full_tokens(life, number)
            for span, target in itertools.product(account.own, life.ledger.workers):
                if target != span.worker and span.start < full:
                    yield Move(number, span.start, min(span.stop, full), span.worker, target)

    def _save(self, fault: Fault) -> str:
        return self._users.save(fault.pick)

    def _load(self, fault: Fault) -> str:
        return self._users.load(fault.pick)

    def _squeeze(self, fault: Fault) -> str:
        return self._users.squeeze(fault.pick)

    def _kill_client(self, fault: Fault) -> str:
        visitor = self._machines.visit(self._state.spec.engine, self._certificates)

        def end() -> None:
            assert visitor.stdout is not None
            with visitor.stdout:
                has_asked = visitor.stdout.readline() == b"asked\n"
            time.sleep(fault.pick * 2)
            visitor.kill()
            visitor.wait()
            how = "with requests under way" if has_asked else "before it could ask"
            at = round(self._users.records.now(), 2)
            self.done.append({"at": at, "kind": fault.kind, "what": f"process {visitor.pid} killed {how}"})
            self.count[f"{fault.kind} {how}"] += 1

        self._beside(end)
        return f"nothing yet: process {visitor.pid} is starting to ask"

    def _cancel(self, fault: Fault) -> str:
        return self._users.cancel(fault.pick)


def _names(victims: list[tuple[Machine, psutil.Process]]) -> str:
    return ", ".join(f"process {process.pid} of {machine.name}" for machine, process in victims) or "nothing"
