"""Which links are measured, and how the performance model uses them."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distkv_dask.geometry import LinkTimes
from distkv_dask.placement import Endpoint, Placement, Span
from distkv_dask.scheduler.costs.links import PER_HOST, next_round, of_pair, wanted, with_links
from distkv_dask.scheduler.costs.model import Link, PerformanceModel
from distkv_dask.scheduler.costs.presets import LINKS, PRESET, PRESETS
from distkv_dask.scheduler.ledger.ledger import Ledger
from distkv_dask.scheduler.policies import policy_named
from distkv_dask.scheduler.policies.base import Ask
from distkv_dask.scheduler.policies.several import kept_for

Both = tuple[Endpoint, Endpoint]


def ends_of(*sizes: int) -> dict[str, Endpoint]:
    """Workers of hosts of these sizes."""
    return {
        f"w{host}-{at}": Endpoint(f"w{host}-{at}", f"h{host}", 1) for host, n in enumerate(sizes) for at in range(n)
    }


def known_as(*pairs: Both) -> list[tuple[str, str]]:
    return [of_pair(*both) for both in pairs]


@given(st.lists(st.integers(1, 12), max_size=8))
def test_every_link_is_measured_once_and_no_host_measures_two_at_a_time(sizes: list[int]) -> None:
    ends = ends_of(*sizes)
    pairs = list(wanted(ends, ()))
    assert len(set(known_as(*pairs))) == len(pairs)
    some = [min(size, PER_HOST) for size in sizes]
    hosts = len(sizes)
    assert len(pairs) == hosts + sum(n * (n - 1) // 2 for n in some) + hosts * (hosts - 1) // 2
    left, done = list(pairs), list[Both]()
    while chosen := next_round(left):
        busy = [host for both in chosen for host in {end.host for end in both}]
        assert len(set(busy)) == len(busy)
        done += chosen
    assert not left
    assert sorted(known_as(*done)) == sorted(known_as(*pairs))


def test_of_a_worker_that_joins_later_only_its_own_links_are_measured() -> None:
    known = known_as(*wanted(ends_of(2, 1), ()))
    assert list(wanted(ends_of(2, 1), known)) == []
    assert known_as(*wanted(ends_of(3, 1), known)) == [("w0-0", "w0-2"), ("w0-1", "w0-2")]
    assert known_as(*wanted(ends_of(2, 1, 1), known)) == [("w2-0", "w2-0"), ("h0", "h2"), ("h1", "h2")]


def test_a_measured_link_costs_what_it_takes_longer_than_a_workers_own() -> None:
    own, near, far = LinkTimes(40e-6, 9e9), LinkTimes(60e-6, 2e9), LinkTimes(540e-6, 1e8)
    times = {("w0-0", "w0-0"): own, ("w0-0", "w0-1"): near, ("h0", "h1"): far}
    preset = replace(PRESET, inside=Link(15e-6, 3e9))
    model, ends = with_links(preset, ends_of(2, 2), times), ends_of(2, 2)
    here, beside, there = ends["w0-0"], ends["w0-1"], ends["w1-1"]
    assert model.link(here, beside).latency == pytest.approx(15e-6 + 20e-6)
    assert model.link(here, there).latency == model.link(there, here).latency == pytest.approx(15e-6 + 500e-6)
    assert model.link(beside, there).bandwidth == 1e8
    assert model.link(ends["w1-0"], there) == model.link(here, beside), "hosts are taken to be alike"


def test_without_measurements_links_are_those_of_the_preset() -> None:
    assert with_links(PRESET, ends_of(2, 2), {}) == PRESET
    times = {("w0-0", "w0-0"): LinkTimes(1e-6, 1e9)}
    assert with_links(PRESET, ends_of(2, 2), times).between == PRESET.between


def test_a_link_that_is_faster_than_a_workers_own_costs_no_less_than_an_exchange_with_itself() -> None:
    times = {("w0-0", "w0-0"): LinkTimes(40e-6, 9e9), ("w0-0", "w0-1"): LinkTimes(10e-6, 2e9)}
    model: PerformanceModel = with_links(PRESET, ends_of(2), times)
    assert model.link(*ends_of(2).values()).latency == PRESET.inside.latency


BLOCK = 16
MODEL = PRESETS["a100-7b"].model
SLOW = LINKS["1gbe"]


def mixed(apart: set[tuple[str, str]]) -> PerformanceModel:
    """A model in which all links are fast, except those of these hosts or workers."""
    return replace(MODEL, between=MODEL.inside, links={tuple(sorted(both)): SLOW for both in apart})  # type: ignore[misc]


def ledger_of(capacity: int, *sizes: int) -> Ledger:
    ledger = Ledger(BLOCK, 8)
    for end in ends_of(*sizes).values():
        ledger.add_worker(end, capacity)
    return ledger


ISLANDS = mixed({(one, other) for one in ("h0", "h1") for other in ("h2", "h3")})
"""The case of Holmes: two fast islands of two hosts each, joined by a slow link."""


def hosts_of(placement: Placement | None) -> set[str]:
    return {span.worker[:2].replace("w", "h") for span in placement or ()}


def test_best_keeps_a_request_on_one_of_two_fast_islands() -> None:
    ledger, best = ledger_of(8, 2, 2, 2, 2), policy_named("best", ISLANDS)
    ledger.reserve(0, (Span("w0-0", 0, 6 * BLOCK),), 6 * BLOCK)
    ledger.reserve(1, (Span("w1-0", 0, 6 * BLOCK),), 6 * BLOCK)
    asked = Ask(2, 22 * BLOCK, 22 * BLOCK)
    placement = best.place(ledger, asked)
    assert hosts_of(placement) == {"h2", "h3"}
    ledger.reserve(2, placement or (), asked.tokens)
    large = Ask(3, 22 * BLOCK, 22 * BLOCK)
    assert best.place(ledger, large) is None, "it waits for room on an island, though there is room on both together"
    blind = policy_named("best", replace(MODEL, between=MODEL.inside)).place(ledger, large)
    assert hosts_of(blind) > {"h2"}, "links that are not known are taken for fast"
    ledger.release_sequence(0)
    assert hosts_of(best.place(ledger, large)) == {"h0", "h1"}


def test_best_crosses_a_slow_link_only_with_what_no_island_holds_and_with_as_few_hosts_as_possible() -> None:
    ledger, best = ledger_of(8, 2, 2, 2, 2), policy_named("best", ISLANDS)
    assert len(hosts_of(best.place(ledger, Ask(0, 36 * BLOCK, 36 * BLOCK)))) == 3
    assert len(hosts_of(best.place(ledger, Ask(0, 60 * BLOCK, 60 * BLOCK)))) == 4


def test_best_lends_nothing_from_a_worker_behind_a_slow_link_on_its_own_host() -> None:
    ledger = ledger_of(8, 3)
    slow = {("w0-0", "w0-2"), ("w0-1", "w0-2")}
    placement = policy_named("best", mixed(slow)).place(ledger, Ask(0, 12 * BLOCK, 12 * BLOCK))
    assert {span.worker for span in placement or ()} == {"w0-0", "w0-1"}
    blind = policy_named("best", MODEL).place(ledger, Ask(0, 12 * BLOCK, 12 * BLOCK))
    assert {span.worker for span in blind or ()} == {"w0-0", "w0-1", "w0-2"}


def test_an_island_is_kept_free_for_a_request_that_waits_for_it() -> None:
    ledger = ledger_of(8, 2, 2, 2, 2)
    ledger.reserve(0, (Span("w0-0", 0, 2 * BLOCK),), 2 * BLOCK)
    ledger.reserve(1, (Span("w2-0", 0, 3 * BLOCK),), 3 * BLOCK)
    assert policy_named("best", ISLANDS).place(ledger, Ask(2, 31 * BLOCK, 31 * BLOCK)) is None
    kept = {worker[:2] for worker in kept_for(ledger, ISLANDS, 31)}
    assert kept in ({"w0", "w1"}, {"w2", "w3"})


def test_a_request_waits_for_the_only_island_that_is_large_enough() -> None:
    alone = mixed({(one, "h0") for one in ("h1", "h2", "h3")})
    ledger, best = ledger_of(8, 4, 2, 2, 2), policy_named("best", alone)
    for number, worker in enumerate(("w1-0", "w2-0", "w3-0")):
        ledger.reserve(number, (Span(worker, 0, 4 * BLOCK),), 4 * BLOCK)
    large = Ask(3, 40 * BLOCK, 40 * BLOCK)  # more than h0 has, which has the most room; less than the three others
    assert best.place(ledger, large) is None
    ledger.release_sequence(0)
    assert hosts_of(best.place(ledger, large)) == {"h1", "h2", "h3"}


@pytest.mark.parametrize("far", [False, True])
def test_an_idle_worker_gets_a_share_of_a_long_request_unless_it_is_behind_a_slow_link(far: bool) -> None:
    ledger = Ledger(BLOCK, 8)
    for end in ends_of(2).values():
        ledger.add_worker(end, 4000)
    ledger.reserve(0, (Span("w0-0", 0, 3000 * BLOCK),), 2000 * BLOCK)
    ledger.commit(0, 2000 * BLOCK)
    model = mixed({("w0-0", "w0-1")} if far else set())
    assert bool(policy_named("best", model).moves(ledger, [])) != far
