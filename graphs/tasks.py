"""The functions that stand in step graphs: each finds its worker's rManager and delegates.

All of them leave the worker's thread pool at once (`secede`): two gangs on workers of one thread would otherwise wait
for each other for ever. Results are small; what a gang computes stays in the pools, tokens travel with the commit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from distributed import get_worker, secede

from distkv_dask.errors import ClusterError
from distkv_dask.protocol import PLUGIN
from distkv_dask.types import DecodeWindow, Gang, PrefillChunk

if TYPE_CHECKING:
    from distkv_dask.worker.rmanager import RManager


def prefill(chunk: PrefillChunk, *after: object) -> int:
    """Compute one chunk of a prompt on the worker that will hold it; returns the number of its tokens."""
    secede()
    return _rmanager().prefill(chunk)


def decode(window: DecodeWindow, *after: object) -> int:
    """Decode for one window at a home; returns the number of steps."""
    secede()
    return _rmanager().decode(window)


def attend(gang: Gang, *after: object) -> dict[str, float]:
    """Hold a session open in which this worker computes attention for the gang's home; returns what it did."""
    secede()
    return _rmanager().attend(gang)


def _rmanager() -> RManager:
    worker = get_worker()
    try:
        return cast("RManager", worker.plugins[PLUGIN])
    except KeyError:
        raise ClusterError(
            f"worker {worker.address} has no rManager: the {PLUGIN!r} worker plugin failed to start there; see its log"
        ) from None
