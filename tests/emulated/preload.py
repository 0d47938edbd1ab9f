"""Preload of Dask workers: theirs is the emulated card, too. Importing it does nothing (pytest looks for doctests)."""

import sys
from pathlib import Path


def dask_setup(worker: object) -> None:
    """Called when a worker starts, before anything in its process asks torch for devices."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from emulated.engine import use_torch_kernels
    from emulated.install import install

    install()
    use_torch_kernels()
