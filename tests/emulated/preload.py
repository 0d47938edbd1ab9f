"""Preload of Dask workers that installs the emulated card. Importing it does nothing (pytest looks for doctests).

As with real cards, a worker from which all cards are hidden gets none.
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
