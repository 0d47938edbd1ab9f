"""Policies on small clusters, compared with brute force."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace

import pytest
from _examples import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from distkv_dask.placement import Endpoint, Move, Placement, Span
from distkv_dask.scheduler.costs.model import Curve
from distkv_dask.scheduler.costs.presets import PRESETS
from distkv_dask.scheduler.ledger.ledger import NO_LIMIT, Ledger
from distkv_dask.scheduler.policies import POLICIES, policy_named
from distkv_dask.scheduler.policies.balance import GAIN, LEAST, WORTH, share_with_idle
from distkv_dask.scheduler.policies.base import Ask
from distkv_dask.scheduler.policies.dgfm import find_cycle
from distkv_dask.scheduler.policies.local_only import LocalOnly

BLOCK = 4
MODEL = PRESETS["cpu-smollm2"].model
BORROWING = ("overflow", "dgfm", "greedy", "best")


@st.composite
def clusters(draw: st.DrawFn, largest: int = 9) -> Ledger:
    """Workers of any size on one to three hosts, some without weights, some leaving; they lend a part."""
    ledger, part = Ledger(BLOCK), draw(st.sampled_from([1.0, 0.5, 0.3]))
    for number in range(draw(st.integers(1, 5))):
        capacity, decodes = draw(st.integers(1, largest)), draw(st.integers(0, 3)) > 0
        endpoint = Endpoint(f"w{number}", f"host{draw(st.integers(0, 2))}", 1)
        lends = int(capacity * part) if decodes else capacity  # as the state machine opens accounts
        ledger.add_worker(endpoint, capacity, lend_limit=lends, can_decode=decodes)
        if draw(st.integers(0, 5)) == 0:
            ledger.retire_worker(endpoint.worker)
    return ledger


def largest(ledger: Ledger, lends: bool) -> int:
    """Blocks of the largest request: those of the best home, with all that other workers may lend to it."""
    stay = [one for one in ledger.workers.values() if not one.retiring]
    return max(
        (
            home.capacity + lends * sum(min(one.lend_limit, one.capacity) for one in stay if one is not home)
            for home in stay
            if home.can_decode
        ),
        default=0,
    )


@pytest.mark.parametrize("name", [name for name in POLICIES if name != "single"])
@settings(max_examples=examples(150), deadline=None)
@given(clusters())
def test_the_largest_request_is_placed_on_an_empty_cluster_and_none_that_is_larger(name: str, ledger: Ledger) -> None:
    policy = policy_named(name, MODEL)
    limit = policy.limit(ledger)
    assert limit == largest(ledger, lends=not isinstance(policy, LocalOnly))
    assert policy.place(ledger, Ask(0, 1, (limit + 1) * BLOCK)) is None
    for blocks in range(1, limit + 1):
        placement = policy.place(ledger, Ask(0, 1, blocks * BLOCK - 1))
        assert placement is not None, f"{blocks} of {limit} blocks"
        fits(ledger, placement, blocks * BLOCK - 1)


def fits(ledger: Ledger, placement: Placement, tokens: int) -> None:
    taken = Counter[str]()
    end = 0
    for span in placement:
        assert span.start == end
        end = span.stop
        taken[span.worker] += -(-span.tokens // BLOCK)
    assert end == tokens
    home = ledger.workers[placement[-1].worker]
    assert home.can_decode
    for worker, blocks in taken.items():
        account = ledger.workers[worker]
        assert not account.retiring
        assert blocks <= (account.free if account is home else account.lendable)


@settings(max_examples=examples(150), deadline=None)
@given(clusters(), st.data())
def test_held_blocks_count_for_nothing(ledger: Ledger, data: st.DataObject) -> None:
    held = {name: data.draw(st.integers(0, one.capacity)) for name, one in ledger.workers.items()}
    smaller = Ledger(BLOCK)
    for name, one in ledger.workers.items():
        lends = min(one.lend_limit, one.capacity)
        smaller.add_worker(
            one.endpoint,
            one.capacity - held[name],
            lend_limit=max(0, lends - held[name]),
            can_decode=one.can_decode,
        )
        if one.retiring:
            smaller.retire_worker(name)
    for policy in (policy_named(name, MODEL) for name in POLICIES):
        assert policy.limit(ledger, held) == policy.limit(smaller)


@settings(max_examples=examples(150), deadline=None)
@given(clusters(20), st.integers(1, 60))
def test_single_lays_on_every_worker_its_part_of_the_room(ledger: Ledger, blocks: int) -> None:
    policy = policy_named("single", MODEL)
    decoders = [name for name, one in ledger.workers.items() if one.can_decode and not one.retiring]
    placement = policy.place(ledger, Ask(0, 1, blocks * BLOCK))
    if not decoders or blocks > policy.limit(ledger):
        assert placement is None
        return
    assert placement is not None
    fits(ledger, placement, blocks * BLOCK)
    assert placement[-1].worker == min(decoders)
    home = ledger.workers[min(decoders)]
    rooms = {name: one.lendable for name, one in ledger.workers.items()} | {home.worker: home.free}
    lies = {span.worker: span.tokens // BLOCK for span in placement}
    share = {name: blocks * room / sum(rooms.values()) for name, room in rooms.items()}
    assert share[home.worker] - 1 <= lies[home.worker] <= max(1, share[home.worker])
    others = [name for name in rooms if name != home.worker]
    assert all(lies.get(name, 0) < share[name] + 1 for name in others)


@settings(max_examples=examples(150), deadline=None)
@given(st.lists(st.integers(1, 12), min_size=2, max_size=5), st.data())
def test_best_leaves_the_workers_of_a_host_equally_much_room(sizes: list[int], data: st.DataObject) -> None:
    ledger = Ledger(BLOCK)
    for number, capacity in enumerate(sizes):
        ledger.add_worker(Endpoint(f"w{number}", "host", 1), capacity)
    blocks = data.draw(st.integers(max(sizes) + 1, sum(sizes)))  # it fits on no single worker
    placement = policy_named("best", MODEL).place(ledger, Ask(0, 1, blocks * BLOCK))
    assert placement is not None
    fits(ledger, placement, blocks * BLOCK)
    lies = {span.worker: span.tokens // BLOCK for span in placement}
    left = {name: one.free - lies.get(name, 0) for name, one in ledger.workers.items()}
    assert max(left.values()) - min(left[name] for name in lies) <= 1


# Debts and moves

debts = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4), st.integers(1, 3)), max_size=8)


def indebted(owed: list[tuple[int, int, int]], capacity: int = 40) -> Ledger:
    ledger = Ledger(BLOCK)
    for number in range(5):
        ledger.add_worker(Endpoint(f"w{number}", "host", 1), capacity)
    for number, (debtor, creditor, blocks) in enumerate(owed):
        if debtor != creditor:
            tokens = blocks * BLOCK
            ledger.reserve(number, (Span(f"w{creditor}", 0, tokens), Span(f"w{debtor}", tokens, tokens + 2)))
            ledger.commit(number, tokens + 1)
    return ledger


@settings(max_examples=examples(150), deadline=None)
@given(debts)
def test_a_circle_is_found_where_any_order_of_workers_is_one(owed: list[tuple[int, int, int]]) -> None:
    ledger = indebted(owed)
    edges = {*ledger.owes.by_pair()}
    circles = {
        order
        for size in range(2, 6)
        for order in itertools.permutations(ledger.workers, size)
        if all((one, order[(at + 1) % size]) in edges for at, one in enumerate(order))
    }
    found = tuple(find_cycle(ledger))
    assert found in circles if circles else not found


@settings(max_examples=examples(150), deadline=None)
@given(st.lists(st.integers(1, 3), min_size=2, max_size=4), st.integers(5, 12))
def test_a_circle_is_recalled_by_its_smallest_debt_as_far_as_there_is_room(sizes: list[int], capacity: int) -> None:
    ledger = indebted([(at, (at + 1) % len(sizes), blocks) for at, blocks in enumerate(sizes)], capacity)
    circle = find_cycle(ledger)
    assert len(circle) == len(sizes)
    pairs = [(one, circle[(at + 1) % len(circle)]) for at, one in enumerate(circle)]
    before = ledger.owes.by_pair()
    smallest = min(before[pair] for pair in pairs)
    home = Counter[tuple[str, str]]()
    for move in policy_named("dgfm", MODEL).moves(ledger, []):
        assert ledger.sequences[move.sequence].home == move.target
        home[move.target, move.source] += ledger.blocks(move.tokens)
    assert home == {pair: min(smallest, ledger.workers[pair[0]].free) for pair in pairs}


@settings(max_examples=examples(200), deadline=None)
@given(
    st.integers(1, 2000), st.integers(1, 4000), st.integers(0, 3000), st.floats(1e-6, 1e-3), st.sampled_from(["a", "b"])
)
def test_a_share_for_an_idle_worker_is_proposed_where_the_model_says_that_it_pays(
    blocks: int, answer: int, room: int, token: float, host: str
) -> None:
    ledger, curve = Ledger(BLOCK), replace(MODEL.curve, token=token)
    model = replace(MODEL, curve=curve)
    ledger.add_worker(Endpoint("home", "a", 1), blocks + answer)
    ledger.add_worker(Endpoint("idle", host, 1), room)
    length = blocks * BLOCK
    ledger.reserve(0, (Span("home", 0, length + answer),), length)
    ledger.commit(0, length)
    share = min(min(length, length + answer - 1) // BLOCK // 2, room, answer * WORTH // BLOCK)
    tokens = share * BLOCK
    link = model.link(Endpoint("home", "a", 1), Endpoint("idle", host, 1))
    before = model.step("home", 1, length, {})
    after = curve.decode(1, 0) + max(length - tokens, tokens) * token + model.exchange(link, 1)
    pays = tokens >= LEAST and before - after >= GAIN * before and 2 * model.transfer(link, tokens) <= answer * before
    assert share_with_idle(ledger, model) == ([Move(0, 0, tokens, "home", "idle")] if pays else [])


def rate(curve: Curve, batch: int, tokens: int) -> float:
    return batch / (curve.step + batch * curve.row + tokens * curve.token) if batch else 0.0


@settings(max_examples=examples(100), deadline=None)
@given(st.integers(10, 60), st.integers(0, 40), st.integers(0, 40), st.integers(1, 12), st.integers(1, 40))
def test_greedy_moves_as_many_blocks_as_raise_throughput_most(
    long: int, free: int, busy: int, guests: int, waits: int
) -> None:
    ledger = Ledger(BLOCK)
    curve = Curve(step=1e-3, row=1e-5, token=1e-4, prompt=1e-3, pair=1e-6)
    policy = policy_named("greedy", replace(MODEL, curve=curve))
    ledger.add_worker(Endpoint("w0", "host", 1), long + free)
    ledger.add_worker(Endpoint("w1", "host", 1), busy + guests + 60)
    ledger.reserve(0, (Span("w0", 0, long * BLOCK),))
    ledger.commit(0, long * BLOCK - 1)
    for number in range(guests):
        ledger.reserve(1 + number, (Span("w1", 0, BLOCK),))
    ledger.reserve(99, (Span("w1", 0, busy * BLOCK + 1),))
    waiting = [Ask(200 + number, 1, waits * BLOCK) for number in range(5)]

    def gain(blocks: int) -> float:
        more = min(blocks + free, long + free) // waits - free // waits
        used = ledger.workers["w1"].used
        here = rate(curve, 1 + more, (long - blocks + more * waits) * BLOCK)
        return here + rate(curve, guests + 1, (used + blocks) * BLOCK)

    creditor = ledger.workers["w1"]
    most = min(long - 1, creditor.lendable)
    tries = sorted({max(1, most * part // 8) for part in range(1, 9)})
    found = policy.moves(ledger, waiting)
    if creditor.used >= 0.9 * creditor.capacity or max(map(gain, tries)) <= gain(0) + 1e-12:
        assert not found or gain(found[0].tokens // BLOCK) > gain(0)
        return
    (move,) = found
    assert (move.sequence, move.source, move.target, move.start) == (0, "w0", "w1", 0)
    assert gain(move.tokens // BLOCK) == pytest.approx(max(map(gain, tries)))


def test_accounts_without_a_limit_lend_all_that_they_have() -> None:
    ledger = Ledger(BLOCK)
    ledger.add_worker(Endpoint("w0", "host", 1), 7)
    assert ledger.workers["w0"].lends == ledger.workers["w0"].lendable == 7 < NO_LIMIT
