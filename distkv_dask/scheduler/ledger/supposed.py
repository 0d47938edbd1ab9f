"""Questions to policies about a ledger that does not exist: with reservations that nobody has made."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from distkv_dask.placement import Placement
from distkv_dask.scheduler.ledger.ledger import Ledger


@contextmanager
def supposed(ledger: Ledger, sequence: int, placement: Placement) -> Iterator[None]:
    """Within it, the ledger has the blocks of a placement (perhaps none) for an idle sequence; it never has them after.

    Parameters
    ----------
    ledger
        It is only to be read meanwhile.
    sequence
        One that has no account yet.
    placement
        Spans of its own.

    Raises
    ------
    ValueError
        They do not fit.
    """
    if not placement:
        yield
        return
    ledger.reserve(sequence, placement, idle=True)
    try:
        yield
    finally:
        ledger.release_sequence(sequence)
