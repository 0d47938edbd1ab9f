"""Which links are measured and in which order, and how the performance model uses them. Pure.

Workers of one host are measured in pairs, but for each pair of hosts only one link is measured: between hosts, the
network is slow, which their workers share. A host takes part in one measurement at a time, so that none disturbs
another.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from itertools import combinations
from statistics import median

from distkv_dask.geometry import LinkTimes
from distkv_dask.placement import Endpoint
from distkv_dask.scheduler.costs.model import Link, Pair, PerformanceModel, pair

PER_HOST = 8
"""Number of workers of one host that are measured with each other; others get the median of these."""
MOST_FAILURES = 2
"""Number of a worker's links that may fail; then no others are tried, because each failure takes a full time limit."""


def of_pair(one: Endpoint, other: Endpoint) -> Pair:
    """The key of the link of two workers: the workers if they are on one host, else their hosts."""
    return pair(one.worker, other.worker) if one.host == other.host else pair(one.host, other.host)


def wanted(ends: Mapping[str, Endpoint], known: Collection[Pair]) -> Iterator[tuple[Endpoint, Endpoint]]:
    """Pairs of workers between which a link is not yet ``known``; for each host also a worker with itself.

    Examples
    --------
    >>> ends = {name: Endpoint(name, host, 1) for name, host in (("a", "h"), ("b", "h"), ("c", "i"))}
    >>> [(one.worker, other.worker) for one, other in wanted(ends, ())]
    [('a', 'a'), ('a', 'b'), ('c', 'c'), ('a', 'c')]
    """
    hosts: dict[str, list[Endpoint]] = {}
    for _, end in sorted(ends.items()):
        hosts.setdefault(end.host, []).append(end)
    inside = (both for each in hosts.values() for both in [(each[0], each[0]), *combinations(each[:PER_HOST], 2)])
    between = ((one[0], other[0]) for one, other in combinations(hosts.values(), 2))
    for one, other in (*inside, *between):
        if of_pair(one, other) not in known:
            yield one, other


def next_round(pairs: list[tuple[Endpoint, Endpoint]]) -> list[tuple[Endpoint, Endpoint]]:
    """Take pairs that can be measured at the same time out of a list."""
    busy: set[str] = set()
    chosen: list[tuple[Endpoint, Endpoint]] = []
    for both in list(pairs):
        if not busy & {end.host for end in both}:
            busy |= {end.host for end in both}
            chosen.append(both)
            pairs.remove(both)
    return chosen


def with_links(
    model: PerformanceModel, ends: Mapping[str, Endpoint], measured: Mapping[Pair, LinkTimes]
) -> PerformanceModel:
    """The model with measured links.

    An exchange with a holder is timed by the code that serves requests, but with a worker's own holder lane. A measured
    link adds the time by which it is slower than the link of a worker with itself. Links that were not measured get the
    median.
    """
    own = [times.latency for (one, other), times in measured.items() if one == other and one in ends]
    base = median(own) if own else 0.0
    floor = model.inside.latency if own else 0.0
    links = {
        both: Link(floor + max(0.0, times.latency - base), times.bandwidth)
        for both, times in measured.items()
        if both[0] != both[1]
    }
    inside = _usual([link for both, link in links.items() if both[0] in ends], model.inside)
    between = _usual([link for both, link in links.items() if both[0] not in ends], model.between)
    return replace(model, inside=inside, between=between, links=links)


def _usual(links: list[Link], preset: Link) -> Link:
    if not links:
        return preset
    return Link(median(link.latency for link in links), median(link.bandwidth for link in links))
