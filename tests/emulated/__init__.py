"""An emulated CUDA device on which the real engine runs: tensors report ``cuda:0``, and are in host memory."""

from emulated.counts import Counts, counting
from emulated.errors import CaptureError, RaceError, StaleGraphError
from emulated.faults import break_card, mend, run_out
from emulated.guard import missing
from emulated.install import install, installed, uninstall

__all__ = [
    "CaptureError", "Counts", "RaceError", "StaleGraphError", "break_card", "counting", "install", "installed", "mend",
    "missing", "run_out", "uninstall",
]  # fmt: skip
