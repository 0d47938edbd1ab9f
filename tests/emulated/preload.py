"""Preload of Dask workers: theirs is the emulated card, too. Importing it does nothing (pytest looks for doctests).

A worker from which all cards are hidden gets none, as with real ones.
"""

import os


def dask_setup(worker: object) -> None:
    """Called when a worker starts, before anything in its process asks torch for devices."""
    from emulated.engine import use_torch_kernels
    from emulated.install import install

    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return
    install()
    use_torch_kernels()
