"""Clusters and commands that fork from one process that has imported everything that a worker needs.

Otherwise importing torch and transformers would cost each process five seconds of a core. As a program, it runs scripts
one after the other in such a process, each with its arguments split as by a shell, and writes the output of each to a
file with its name.
"""

from __future__ import annotations

import os
import runpy
import shlex
import sys
import traceback
from collections.abc import Mapping
from contextlib import redirect_stdout
from multiprocessing import forkserver
from pathlib import Path

import dask.config
from distributed.utils import get_mp_context


def fork_workers() -> None:
    """Make all clusters that are started later fork their workers."""
    dask.config.set({"distributed.worker.multiprocessing-method": "forkserver"})
    get_mp_context().set_forkserver_preload(
        [
            "distkv_dask.worker.rmanager",
            "distkv_dask.worker.startup",
            "distkv_dask.worker.model.load",
            "transformers.models.llama.modeling_llama",
        ]
    )


class Forked:
    """``python -m MODULE ARGUMENTS`` without its output, with the methods of :class:`subprocess.Popen` that tests use.

    Parameters
    ----------
    module, arguments
        The module and its arguments.
    environment
        Additional environment variables.
    """

    def __init__(self, module: str, *arguments: object, environment: Mapping[str, str] | None = None) -> None:
        command = [module, *map(str, arguments)]
        self._process = get_mp_context().Process(target=_run, args=(command, {**os.environ, **(environment or {})}))
        self._process.start()
        self.pid = self._process.pid
        self.kill = self._process.kill
        self.terminate = self._process.terminate

    def poll(self) -> int | None:
        """Its exit status, or None while it runs."""
        return self._process.exitcode

    def wait(self, seconds: float) -> int | None:
        """Its exit status, once it has ended or this time has passed."""
        self._process.join(seconds)
        return self.poll()


def _run(command: list[str], environment: Mapping[str, str]) -> None:
    os.environ.update(environment)
    dask.config.refresh()
    fork_workers()
    if (server := forkserver._forkserver)._forkserver_address:  # type: ignore[attr-defined]
        # Its workers must be forked from the server that forked it; Python intends this, but starts another server.
        server.ensure_running = lambda: None  # type: ignore[method-assign]
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    sys.argv = command
    runpy.run_module(command[0], run_name="__main__", alter_sys=True)


def main(folder: Path, commands: list[str]) -> None:
    """Run scripts with their arguments; if one fails, the error is printed and the next one runs."""
    fork_workers()
    for command in commands:
        script, *_ = sys.argv = shlex.split(command)
        with (folder / f"{Path(script).name}.out").open("w") as out, redirect_stdout(out):
            try:
                runpy.run_path(script, run_name="__main__")
            except (Exception, SystemExit):
                print(command, file=sys.stderr)
                traceback.print_exc()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
