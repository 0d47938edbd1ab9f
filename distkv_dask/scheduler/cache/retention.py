"""Retention: how much it is worth to keep a block of an ended request (Pensieve, section 4.3.2). Pure.

The value of a block is the cost of getting it back times the probability that it is needed, which falls with the time
since its last use. All blocks have the same size. A later block costs more to recompute, since it attends to all blocks
before it, so the front of a text is evicted first. A block with a copy costs at most the reading of the copy.
"""

from __future__ import annotations

from math import log2

from distkv_dask.scheduler.records.extents import Place
from distkv_dask.scheduler.records.machine_state import MachineState

YOUNGEST = 1e-3
"""Minimum of the seconds since a block's last use."""

COPY_PAYS = 2.0
"""Recomputing must take this many times as long as reading back, because blocks also had to be written."""


def recomputed(life: MachineState, worker: str, start: int, stop: int) -> float:
    """Seconds to compute tokens ``[start, stop)`` on a worker."""
    return life.policy.model.of(worker).prefill(stop - start, start)


def read(life: MachineState, place: Place, worker: str, tokens: int) -> float:
    """Seconds in which a worker reads the KV of this many tokens of an extent."""
    size = life.ledger.blocks(tokens) * life.block_bytes
    if place.kind == "disk":
        return size / life.disks.disk.rate
    here, there = (life.ledger.workers[one].endpoint for one in (worker, place.worker))
    return life.policy.model.link(here, there).seconds(size)


def pays(life: MachineState, place: Place, worker: str, start: int, stop: int) -> bool:
    """Whether copying tokens to a place, or reading them there, pays for a worker that could also compute them."""
    return COPY_PAYS * read(life, place, worker, stop - start) < recomputed(life, worker, start, stop)


def value(life: MachineState, seconds: float, used: float) -> float:
    """Value of something that costs ``seconds`` to get back and was last used at ``used``: cost per second of age.

    Costs count in powers of two: they are estimates, and among similar ones the oldest should go.
    """
    return float(2.0 ** round(log2(max(seconds, 1e-9)))) / max(life.now - used, YOUNGEST)
