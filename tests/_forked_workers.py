"""Clusters whose workers fork from one process that has imported all that a worker needs.

Importing torch and transformers takes each worker seconds of a core otherwise. As a program, run scripts one after the
other in such a process, and write what each prints to a file of its name.
"""

from __future__ import annotations

import runpy
import sys
import traceback
from contextlib import redirect_stdout
from pathlib import Path

import dask.config
from distributed.utils import get_mp_context


def fork_workers() -> None:
    """Let clusters that are started from now on fork their workers."""
    dask.config.set({"distributed.worker.multiprocessing-method": "forkserver"})
    get_mp_context().set_forkserver_preload(
        [
            "distkv_dask.worker.rmanager",
            "distkv_dask.worker.startup",
            "distkv_dask.worker.model.loaded",
            "transformers.models.llama.modeling_llama",
        ]
    )


def main(folder: Path, scripts: list[str]) -> None:
    fork_workers()
    for script in scripts:
        with (folder / f"{Path(script).name}.out").open("w") as out, redirect_stdout(out):
            try:
                runpy.run_path(script, run_name="__main__")
            except Exception:
                print(script, file=sys.stderr)
                traceback.print_exc()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
