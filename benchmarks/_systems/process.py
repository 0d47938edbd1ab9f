"""Processes of systems: their environments, how they are started and asked, and their peak memory."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import psutil

from _systems.cases import Case

LOAD_SECONDS, ANSWER_SECONDS = 600.0, 900.0
BENCHMARKS = Path(__file__).resolve().parent.parent


class Refused(Exception):
    """A system's process answered with an error, or ended; the text says which."""


@dataclass(frozen=True, slots=True)
class System:
    """A system with its settings: ``driver`` is the module that drives it, in the environment of that name.

    ``small`` means that its pool has no room for a document; ``only`` names the cases that it answers (all if empty).
    """

    driver: str
    settings: dict[str, Any]
    small: bool = False
    only: tuple[str, ...] = ()

    def answers(self, case: Case) -> bool:
        """Whether it takes part in a case."""
        return not self.only or case.name in self.only

    def python(self, environments: Path) -> Path:
        """Its interpreter: this process's own for systems that are installed in its environment."""
        own = self.driver in ("distkv", "transformers")
        return Path(sys.executable) if own else environments / self.driver / "bin" / "python"

    def variables(self, environments: Path) -> dict[str, str]:
        """Its environment variables: vLLM needs two preloaded libraries, and all cores."""
        path = {"PYTHONPATH": os.pathsep.join([str(BENCHMARKS), str(BENCHMARKS.parent)])}
        if self.driver != "vllm":
            return {**os.environ, **path}
        libraries = [environments / "vllm" / "lib" / name for name in ("libtcmalloc_minimal.so", "libiomp5.so")]
        return {
            **os.environ,
            **path,
            "LD_PRELOAD": ":".join(str(one) for one in libraries if one.exists()),
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, sorted(os.sched_getaffinity(0)))),
            "VLLM_CACHE_ROOT": str(environments / "vllm" / "cache"),
            "VLLM_LOGGING_LEVEL": "WARNING",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        }


class Child:
    """A system's process that has loaded; ``about`` describes it. Its output goes to a log file in ``folder``.

    Raises
    ------
    Refused
        When it cannot load.
    """

    def __init__(self, name: str, system: System, folder: Path) -> None:
        self.log = folder / f"{name.replace(' ', '-')}.log"
        command = [system.python(folder), "-m", "_systems.child", system.driver, json.dumps(system.settings)]
        with self.log.open("w") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
                env=system.variables(folder), text=True,
            )  # fmt: skip
        self._tree = psutil.Process(self._process.pid)
        try:
            self.about = str(self._reply(LOAD_SECONDS)["about"])
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def ask(self, request: dict[str, Any]) -> tuple[dict[str, Any], float]:
        """Send a request; returns the answer, and the sum of its processes' peak memory during it, in GB.

        Raises
        ------
        Refused
            When it answers with an error, or not in time.
        """
        for one in self._processes():
            with contextlib.suppress(OSError):
                Path(f"/proc/{one.pid}/clear_refs").write_text("5")  # resets the peak
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._reply(ANSWER_SECONDS), sum(map(_peak, self._processes())) / 1e6

    def close(self) -> None:
        """End it, and all processes that it started."""
        everything = self._processes()
        assert self._process.stdin is not None
        self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(20)
        for one in everything:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()

    def _processes(self) -> list[psutil.Process]:
        try:
            return [self._tree, *self._tree.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def _reply(self, seconds: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], seconds)
        if not ready:
            raise Refused(f"no answer within {seconds:.0f} s; see {self.log}")
        line = self._process.stdout.readline()
        if not line:
            raise Refused(f"its process ended with status {self._process.wait()}; see {self.log}")
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise Refused(reply["error"])
        return reply


def _peak(process: psutil.Process) -> int:
    """Peak of a process's resident memory in kB; 0 if it has ended."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1])
    return 0
