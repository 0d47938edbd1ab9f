"""Mixed networks: islands of hosts with fast links, joined by slow ones."""

from __future__ import annotations

from itertools import combinations

from distkv_dask.scheduler.costs.model import Link, Pair
from distkv_dask.scheduler.costs.presets import Preset


def between_islands(preset: Preset, workers: int, islands: int, link: Link) -> dict[Pair, Link]:
    """Slow links between hosts of different islands, which are groups of hosts with successive numbers.

    Examples
    --------
    >>> from distkv_dask.scheduler.costs.presets import LINKS, PRESETS
    >>> list(between_islands(PRESETS["a100-7b"], 32, 2, LINKS["1gbe"]))
    [('h0000', 'h0002'), ('h0000', 'h0003'), ('h0001', 'h0002'), ('h0001', 'h0003')]
    """
    count = -(-workers // preset.per_host)
    hosts = [(f"h{at:04}", at * islands // count) for at in range(count)]
    pairs = combinations(hosts, 2)
    return {(one, other): link for (one, here), (other, there) in pairs if here != there}
