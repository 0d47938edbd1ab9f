"""Times of different ways to compute the same: measured once per machine, and again until they repeat."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol, TypeVar

from filelock import FileLock, Timeout

from distkv_dask.worker.timing.measurement_cache import cache_file, is_young, keep, read_kept

KEPT_SECONDS = 30 * 24 * 3600
"""After this time, a machine is measured again: earlier disturbances have ended."""
LOCK_SECONDS = 10


class Repeated(Protocol):
    """Times that know whether they repeat."""

    @property
    def settled(self) -> bool:
        """Whether each best time came twice: otherwise something else ran, and it is worth timing again."""
        ...


Times = TypeVar("Times", bound=Repeated)


def machine_times(
    key: dict[str, object],
    measure: Callable[[Times | None], Times],
    forms: tuple[Callable[[Any], Times], Callable[[Times], dict[str, Any]]],
    *,
    again: bool = False,
) -> Times:
    """Kept times of this machine, or new ones.

    Disturbed times are improved at the next opportunity, that is by the next process.

    Parameters
    ----------
    key
        Everything on which the times depend.
    measure
        Measures, and combines the times with those known.
    forms
        Convert times from JSON and to it; the first one raises ValueError, KeyError or TypeError for what is none.
    again
        Whether kept times are not read.
    """
    file, (parse, as_json) = cache_file(key), forms
    with _alone(file):  # other workers wait while the first one of a host measures, and read its result
        known = read_kept(file, parse) if not again and is_young(file, KEPT_SECONDS) else None
        if known is not None and known.settled:
            return known
        fresh = measure(known)
        keep(file, key, as_json(fresh))
        return fresh


@contextlib.contextmanager
def _alone(file: Path) -> Iterator[None]:
    """Hold a lock of the host; continues without one if the folder has no locks or the lock is stuck."""
    lock = FileLock(file.with_suffix(".lock"), timeout=LOCK_SECONDS)
    with contextlib.ExitStack() as held:
        with contextlib.suppress(OSError, Timeout):
            file.parent.mkdir(parents=True, exist_ok=True)
            held.enter_context(lock)
        yield
