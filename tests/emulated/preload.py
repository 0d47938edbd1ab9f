"""Preload of Dask workers: theirs is the emulated card, too. Loaded before anything that asks torch for its devices."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from emulated.engine import use_torch_kernels
from emulated.install import install

install()
use_torch_kernels()
