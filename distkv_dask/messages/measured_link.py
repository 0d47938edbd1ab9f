"""A measured link between workers, as the status shows it."""

from __future__ import annotations

from typing import NamedTuple


class MeasuredLink(NamedTuple):
    """A measured link of two workers of one host, or of two hosts: seconds one way, and bytes per second."""

    one: str
    other: str
    latency: float
    bandwidth: float
