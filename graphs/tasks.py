"""The functions in step graphs: each finds its worker's rManager and delegates.

Functions that wait for other tasks leave the worker's thread pool at once (`secede`): two gangs on workers of one
thread would otherwise wait for each other forever. KV stays in the pools, and tokens are sent with the commit; with
layer granularity, queries and partials are results.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from distributed import get_worker, secede

from distkv_dask.errors import ClusterError
from distkv_dask.gang import Attended, DecodeWindow, Gang, PrefillChunk
from distkv_dask.messages.names import PLUGIN

if TYPE_CHECKING:
    from distkv_dask.worker.rmanager import RManager
    from distkv_dask.worker.tensor_message import TensorMessage


def prefill(chunk: PrefillChunk, *after: object) -> int:
    """Compute one chunk of a prompt on the worker that will hold its KV; returns the number of its tokens."""
    secede()
    return _rmanager().prefill(chunk)


def decode(window: DecodeWindow, *after: object) -> int:
    """Decode for one window at a home; returns the number of steps."""
    secede()
    return _rmanager().decode(window)


def attend(gang: Gang, *after: object) -> Attended:
    """Compute attention for the gang's home until it ends the session; returns what was done."""
    secede()
    return _rmanager().attend(gang)


def begin_forward(work: PrefillChunk | DecodeWindow, *after: object) -> TensorMessage | None:
    """Start a forward at a home; returns the queries of its first layer for the holders, or None."""
    secede()
    return _rmanager().layers(work.gang.engine).begin_forward(work)


def layer(gang: Gang, at: int, asked: TensorMessage | None, *answers: TensorMessage | None) -> TensorMessage | None:
    """Continue with the partials of the layer before; returns the queries of layer ``at``."""
    return None if asked is None else _rmanager().layers(gang.engine).layer(gang, at, answers)


def attend_layer(gang: Gang, asked: TensorMessage | None) -> TensorMessage | None:
    """Compute a holder's partials of one layer; None if it has no queries."""
    return None if asked is None else _rmanager().layers(gang.engine).attend(gang, asked)


def finish(gang: Gang, layers: int, asked: TensorMessage | None, *answers: TensorMessage | None) -> int:
    """End a forward with the partials of its last layer, and commit; returns decode steps or prompt tokens."""
    return 0 if asked is None else _rmanager().layers(gang.engine).finish(gang, layers, answers)


def _rmanager() -> RManager:
    worker = get_worker()
    try:
        return cast("RManager", worker.plugins[PLUGIN])
    except KeyError:
        raise ClusterError(
            f"worker {worker.address} has no rManager: the {PLUGIN!r} worker plugin failed to start there; see its log"
        ) from None
