"""Our own policy."""

from __future__ import annotations

from typing import ClassVar

from distkv_dask.scheduler.policies.greedy import Greedy


class Best(Greedy):
    """Greedy so far."""

    name: ClassVar[str] = "best"
