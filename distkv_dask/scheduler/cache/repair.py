"""Repair: a sequence that lost blocks with a worker gets new room for only these, and keeps the rest."""

from __future__ import annotations

from collections import Counter

from distkv_dask.messages.to_worker import Begin
from distkv_dask.placement import Placement
from distkv_dask.scheduler.cache import prefix_cache
from distkv_dask.scheduler.ledger.accounts import SequenceAccount
from distkv_dask.scheduler.ledger.ledger import Ledger
from distkv_dask.scheduler.ledger.placements import clipped, relaid
from distkv_dask.scheduler.policies.base import Ask, Policy
from distkv_dask.scheduler.records.machine_state import MachineState
from distkv_dask.scheduler.records.request import Request
from distkv_dask.scheduler.records.states import Decode, Prefill, State


def repaired(life: MachineState, request: Request) -> State | None:
    """Find new room for only the lost blocks of a sequence; returns the state in which it continues.

    None if there is no such room now, if the lost blocks are in files, or if the home lacks the state before them.
    """
    account, number = life.ledger.sequences[request.sequence], request.sequence
    if request.is_released or request.saved is not None or not account.lost:
        return None
    begins = _begins(life, request) if life.ledger.has_states else None
    if life.ledger.has_states and begins is None:
        return None
    placement = placement_without_losses(life.ledger, life.policy, request)
    if placement is None:
        return None
    length = account.length
    lost = _lost(account)
    life.ledger.commit(number, min([length, *(start for start, _ in lost)]))
    life.ledger.replace_lost(number, placement)
    prefix_cache.allocate(life, number)
    if begins is not None and lost:
        source, start = begins
        life.ledger.commit(number, start)
        if start:
            life.command(Begin(account.home, number, source, start))
        return Prefill(start)
    if lost or length < request.known_tokens:
        return Prefill(length, lost)
    return Decode()  # only room was lost


def _lost(account: SequenceAccount) -> tuple[tuple[int, int], ...]:
    """Token ranges whose KV is lost."""
    computed = clipped(account.placement, 0, account.length)
    return tuple((span.start, span.stop) for span in computed if span.worker in account.lost)


def _begins(life: MachineState, request: Request) -> tuple[int, int] | None:
    """The snapshot, by sequence and tokens, from which a sequence that lost KV continues; None if its home is lost."""
    account = life.ledger.sequences[request.sequence]
    if account.home in account.lost:
        return None
    first = min((start for start, _ in _lost(account)), default=account.length)
    known = [(at, request.sequence) for at in life.snapshots.of.get(request.sequence, ()) if at <= first]
    begins, shared = request.reuse.begins, request.reuse.shared
    if begins is not None and shared in life.snapshots.of.get(begins, ()):
        known.append((shared, begins))
    if not shared:
        known.append((0, request.sequence))
    return max(known)[::-1] if known else None


def placement_without_losses(ledger: Ledger, policy: Policy, request: Request) -> Placement | None:
    """A sequence's placement with its lost blocks elsewhere, if the policy finds room for them now.

    None if there is no room, if none of its own blocks are left, or if blocks are lost that it shares with others.
    """
    account = ledger.sequences[request.sequence]
    lost = [span for span in account.placement if span.worker in account.lost]
    kept = [span for span in account.own if span.worker not in account.lost and span.tokens]
    tokens = sum(span.tokens for span in lost)
    if not kept or not tokens or account.moves or account.sharers or any(span.document is not None for span in lost):
        return None
    asked = request.asked
    ask = Ask(request.sequence, tokens, tokens, asked.submitted, asked.sampling.priority, is_document=account.idle)
    laid = policy.place(ledger, ask)
    if laid is None:
        return None
    placement = relaid(account.placement, account.lost, laid, ledger.block_tokens)
    more = Counter[str]()
    for span in laid:
        more[span.worker] += ledger.blocks(span.tokens)
    home = placement[-1].worker
    fits = all(ledger.workers[one].lendable >= blocks for one, blocks in more.items() if one != home)
    return placement if fits and ledger.workers[home].can_decode else None
