"""Retention: how much it is worth to keep a block of an ended request (Pensieve, section 4.3.2). Pure.

A block is worth what it costs to get it back, times how likely it is needed, which falls with the time since its last
use. All blocks have the same size. To recompute one costs more the later it comes, since it attends to all before it:
so the front of a text goes first. One that has a copy costs no more than to read that.
"""

from __future__ import annotations

from math import log2

from distkv_dask.scheduler.records.extents import Place
from distkv_dask.scheduler.records.machine_state import MachineState

YOUNGEST = 1e-3
"""Seconds since its last use that a block has at least."""

COPY_PAYS = 2.0
"""Recomputing must take this many times as long as reading back: what is read has been written before."""


def recomputed(life: MachineState, worker: str, start: int, stop: int) -> float:
    """Seconds to compute tokens ``[start, stop)`` on a worker."""
    return life.policy.model.of(worker).prefill(stop - start, start)


def read(life: MachineState, place: Place, worker: str, tokens: int) -> float:
    """Seconds in which a worker reads the KV of so many tokens from where an extent is."""
    size = life.ledger.blocks(tokens) * life.block_bytes
    if place.kind == "disk":
        return size / life.disks.disk.rate
    here, there = (life.ledger.workers[one].endpoint for one in (worker, place.worker))
    return life.policy.model.link(here, there).seconds(size)


def pays(life: MachineState, place: Place, worker: str, start: int, stop: int) -> bool:
    """Whether tokens are worth a copy in a place, or reading one, for a worker that could also compute them."""
    return COPY_PAYS * read(life, place, worker, stop - start) < recomputed(life, worker, start, stop)


def value(life: MachineState, seconds: float, used: float) -> float:
    """What is lost per second of age with something that costs ``seconds`` to get back, last used then.

    Costs count in powers of two: they are estimates, and among similar ones the oldest should go.
    """
    return float(2.0 ** round(log2(max(seconds, 1e-9)))) / max(life.now - used, YOUNGEST)
