"""Machines of the cluster: each has its own address, and one or two nannies with worker processes."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import dask.config
import psutil

from _chaos.network import Link, Loopback
from _chaos.relay import Relays

MARK = "DISTKV_CHAOS"
"""Variable in the environment of every process of a run, by which leftover processes are found."""

HOME = Path(__file__).resolve().parent.parent
"""Folder from which workers import the functions of this package that are run on them."""

PRELOAD, TRACEBACKS, VISITOR = (
    Path(__file__).with_name(name) for name in ("preload.py", "tracebacks.py", "visitor.py")
)
WORKER_SETTINGS = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "DASK_DISTRIBUTED__WORKER__MULTIPROCESSING_METHOD": "forkserver",
}


class Machine:
    """One machine.

    Parameters
    ----------
    name, link
        Its name and network link.
    scheduler
        The scheduler's address, and the options that are needed to connect.
    workers
        Number of workers.
    folder
        Folder for the machine's logs and its workers' files.
    """

    def __init__(self, name: str, link: Link, scheduler: Sequence[str], workers: int, folder: Path) -> None:
        self.name = name
        self.link = link
        self.workers = workers
        self.log = folder / "logs" / f"{name}.log"
        self._scratch = folder / "scratch" / name
        self._scratch.mkdir(parents=True)
        command = [
            sys.executable, "-m", "dask", "worker", *scheduler, "--host", link.host, "--name", name, "--nthreads", "1",
            "--nworkers", str(workers), "--memory-limit", "0", "--no-dashboard", "--death-timeout", "60",
            "--local-directory", str(self._scratch), "--preload-nanny", str(PRELOAD),
            "--preload", str(TRACEBACKS),
            *(f"--preload={one}" for one in dask.config.get("distributed.worker.preload")),
        ]  # fmt: skip
        path = os.pathsep.join(filter(None, (str(HOME), os.environ.get("PYTHONPATH"))))
        own = WORKER_SETTINGS | {MARK: str(folder), "TMPDIR": str(self._scratch), "PYTHONPATH": path}
        with self.log.open("wb") as log:
            self._process = link.launch(
                command, stdout=log, stderr=subprocess.STDOUT, env=os.environ | WORKER_SETTINGS | own
            )

    @property
    def is_up(self) -> bool:
        """Whether it is running."""
        return self._process.poll() is None

    def processes(self) -> list[psutil.Process]:
        """Its worker processes: children of the process that they are forked from."""
        with contextlib.suppress(psutil.NoSuchProcess):
            nanny = psutil.Process(self._process.pid)
            helpers = nanny.children()
            below = [child for helper in helpers for child in helper.children()]
            return sorted((one for one in below if _is_alive(one)), key=lambda one: one.pid)
        return []

    def tell(self) -> None:
        """Let every worker log the stacks of its threads."""
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGUSR1)

    def kill(self) -> None:
        """Simulate a loss of power and disk."""
        with contextlib.suppress(psutil.NoSuchProcess):
            nanny = psutil.Process(self._process.pid)
            for one in [nanny, *nanny.children(recursive=True)]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    one.kill()
        self._process.wait(30)
        shutil.rmtree(self._scratch, ignore_errors=True)

    def stop(self) -> None:
        """Stop cleanly, or kill."""
        if self.is_up:
            self._process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(30)
                return
        self.kill()


def _is_alive(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.status() != psutil.STATUS_ZOMBIE
    return False


class Machines:
    """All machines of a run.

    Parameters
    ----------
    scheduler
        The scheduler's address, and the options that are needed to connect.
    folder
        Folder for their logs and files.
    cuttable
        Whether they are in network namespaces.
    """

    def __init__(self, scheduler: Sequence[str], folder: Path, cuttable: bool) -> None:
        self._scheduler = scheduler
        self._folder = folder
        self._cuttable = cuttable
        self.relays: Relays | None = None
        """Cuts links if there are no network namespaces."""
        self._numbers = itertools.count(2)
        self._all: list[Machine] = []
        self._lock = threading.Lock()

    def start(self, workers: int = 1) -> Machine:
        """Add a machine."""
        with self._lock:
            number = next(self._numbers)
            link = Link(number) if self._cuttable else Loopback(number, lambda: self.relays)
            machine = Machine(f"m{number}", link, self._scheduler, workers, self._folder)
            self._all.append(machine)
            return machine

    def visit(self, engine: str, files: Sequence[str]) -> subprocess.Popen[bytes]:
        """Start a client of an engine in its own process, with certificates if the cluster has any."""
        log = self._folder / "logs" / "visitors.log"
        own = {MARK: str(self._folder), "HF_HUB_OFFLINE": "1"}
        with log.open("ab") as errors:
            return subprocess.Popen(
                [sys.executable, str(VISITOR), self._scheduler[0], engine, *files],
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, env=os.environ | own,
            )  # fmt: skip

    def up(self) -> list[Machine]:
        """Machines that are running."""
        return [one for one in list(self._all) if one.is_up]

    def workers(self) -> list[tuple[Machine, psutil.Process]]:
        """Worker processes that are alive, including frozen ones."""
        return [(machine, process) for machine in self.up() for process in machine.processes()]

    def stop(self) -> list[psutil.Process]:
        """Stop all; returns the processes of the run that are left."""
        for machine in list(self._all):
            machine.stop()
        deadline = time.monotonic() + 10
        while (left := list(self._marked())) and time.monotonic() < deadline:
            time.sleep(0.1)
        return left

    def _marked(self) -> Iterator[psutil.Process]:
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.pid != os.getpid() and process.environ().get(MARK) == str(self._folder):
                    yield process
