"""The prefix cache: blocks of finished requests are kept until their room is needed.

As in vLLM's automatic prefix caching, cached blocks count as free: the ledger does not know them, so they never delay,
split or move requests. The pools still have them, under the number of the request that computed them. When the ledger
reserves their room, they are released first: those of the least value first
(:mod:`~distkv_dask.scheduler.cache.retention`), and of each sequence its last blocks first. Before that, they are
copied to other workers or to disks (:mod:`~distkv_dask.scheduler.cache.copies`).

The shared part of a cached sequence returns to the ledger as a document without a name: ``held`` is the position up to
which the ledger has it, and the blocks beyond are cached. A request that shared a prefix is cached behind it: its
``parent`` has the tokens before ``start``.
"""

from __future__ import annotations

from distkv_dask.messages.to_worker import Free, Release, Reserve
from distkv_dask.placement import Placement
from distkv_dask.scheduler.cache import beginnings, lower_tiers, snapshots
from distkv_dask.scheduler.ledger.accounts import SequenceAccount
from distkv_dask.scheduler.ledger.placements import clipped
from distkv_dask.scheduler.records.cached import Cached
from distkv_dask.scheduler.records.machine_state import MachineState
from distkv_dask.scheduler.records.prefix_index import chain
from distkv_dask.scheduler.records.request import Request

# Use


def share_cached(life: MachineState, number: int, tokens: int, user: int) -> None:
    """Let ``user`` share a sequence's first tokens; the ledger has room for those that it lacks."""
    cached = life.cache.by_number.get(number)
    if cached is not None:
        cached.users[user] = tokens
        cached.lengths.add(tokens)
        held = max(cached.held, tokens)
        if number in life.requests:
            _set_bounds(life, cached, held, cached.stop)
            life.ledger.resize(number, clipped(cached.spans, cached.start, held))
        else:
            if cached.parent is not None:
                share_cached(life, cached.parent, cached.start, number)
            _set_bounds(life, cached, held, cached.stop)
            placement = (*beginnings.before(life, cached), *clipped(cached.spans, cached.start, held))
            _return_to_ledger(life, cached, placement)
    life.demand(number).dependents.add(user)


def _return_to_ledger(life: MachineState, cached: Cached, placement: Placement) -> None:
    """Make a sequence that is shared again a document without a name."""
    number = cached.number
    life.ledger.reserve(number, placement, cached.held, idle=True, cached=True)
    life.ledger.commit(number, cached.held)
    life.requests[number] = Request.of_cached(number, cached.parent, life.now)


def stop_sharing(life: MachineState, number: int, user: int) -> None:
    """A sharer of a sequence has ended: blocks without other sharers are cached again.

    (Without any sharer, :func:`free_or_cache` is called next.)
    """
    cached = life.cache.by_number.get(number)
    if cached is None or user not in cached.users:
        return
    cached.lengths.remove(cached.users.pop(user))
    if cached.lengths and cached.lengths[-1] < cached.held and not cached.closed:
        life.ledger.resize(number, clipped(cached.spans, cached.start, cached.lengths[-1]))
        _set_bounds(life, cached, cached.lengths[-1], cached.stop)
        _cut_at_leaving(life, cached)


# Sequences that end


def free_or_cache(life: MachineState, request: Request) -> None:
    """A sequence is idle: free its blocks in the ledger, and cache or release them."""
    account = life.ledger.sequences[request.sequence]
    workers = life.ledger.release_sequence(request.sequence)
    cached = life.cache.by_number.get(request.sequence)
    if cached is not None:
        cached.closed |= bool(account.lost) or not life.cache.enabled
        _set_bounds(life, cached, cached.start, cached.stop)
        if cached.closed:
            _cut(life, cached, cached.start)
        else:
            _cut_at_leaving(life, cached)
    elif (cached := _worth_caching(life, request, account)) is not None:
        _add(life, cached, account, workers)
    else:
        for child in life.cache.beyond(request.sequence, 0):
            _cut(life, child, child.start)
        home = snapshots.drop(life, request.sequence)
        for worker in dict.fromkeys([*workers, *home]):
            life.command(Release(worker, request.sequence))


def _worth_caching(life: MachineState, request: Request, account: SequenceAccount) -> Cached | None:
    """The part of a finished sequence to cache, if it is a plain request that succeeded."""
    cache, size = life.cache, life.ledger.block_tokens
    went_well = request.is_plain and request.ended in ("stop", "length") and not (account.lost or account.moves)
    if not (cache.enabled and went_well):
        return None
    start = account.own[0].start
    leaving = (span.start for span in account.own if life.ledger.workers[span.worker].retiring)
    stop = min([account.length // size * size, *leaving])
    if stop <= start:
        return None
    parent = request.document if start else None
    if parent is not None and parent in cache.by_number and cache.by_number[parent].closed:
        return None
    tokens = request.known[:stop]
    keys = list(chain(tokens, size, request.adapter_key))[start // size :]
    has_snapshots = request.sequence in life.snapshots.of
    if start and keys[-1] in cache.index and not has_snapshots:
        # the sequence whose prefix it shared continues with the same tokens
        cache.touch(next(iter(cache.index[keys[-1]])), life.now)
        return None
    spans = tuple(clipped(account.own, start, stop))
    return Cached(request.sequence, start, tokens[start:], keys, spans, parent, stop, request.adapter_key)


def _add(life: MachineState, cached: Cached, account: SequenceAccount, workers: list[str]) -> None:
    """Cache a sequence's whole blocks, and free its unused room."""
    life.cache.add(cached)
    _set_bounds(life, cached, cached.start, cached.stop)
    snapshots.keep_only_snapshots(life, cached.number, account.home, cached.stop)
    there = _there(life, cached)
    for worker in workers:
        if worker not in there:
            life.command(Release(worker, cached.number))
    for span in clipped(account.own, cached.stop, account.stop):
        if span.worker in there:
            life.command(Free(span.worker, cached.number, span.start, span.stop))


def _there(life: MachineState, cached: Cached) -> set[str]:
    """Workers that keep something of a sequence."""
    home = life.snapshots.homes.get(cached.number)
    return {*(span.worker for span in cached.spans), *([home] if home is not None else [])}


# Room


def make_room(life: MachineState, worker: str) -> None:
    """Release as many cached blocks as the ledger has given to others on a worker."""
    account = life.ledger.workers[worker]
    life.extents.short[worker] = None
    while (more := account.used + account.cached - account.capacity) > 0:
        match lower_tiers.least(life, worker):
            case Cached() as cached:
                _cut(life, cached, _stop_without(life, cached, worker, more))
            case extent:
                lower_tiers.give_up(life, extent)


def allocate(life: MachineState, sequence: int) -> None:
    """Let the workers allocate what the ledger reserved for a sequence; cached blocks go first."""
    snapshots.make_room(life, life.ledger.sequences[sequence].home)
    for span in life.ledger.sequences[sequence].own:
        make_room(life, span.worker)
        life.command(Reserve(span.worker, sequence, span.start, span.stop))


def _stop_without(life: MachineState, cached: Cached, worker: str, blocks: int) -> int:
    """The position from which a sequence has this many cached blocks on a worker, or all of them."""
    stop = cached.stop
    for span in reversed(list(clipped(cached.spans, cached.held, cached.stop))):
        if span.worker == worker and blocks:
            fewer = min(blocks, life.ledger.blocks(span.tokens))
            blocks -= fewer
            stop = span.stop - fewer * life.ledger.block_tokens
    return stop


def drain(life: MachineState, worker: str) -> None:
    """A worker is drained: drop its cached blocks."""
    lower_tiers.leave(life, worker)
    for number in list(life.cache.recent.get(worker, ())):
        if number in life.cache.by_number:
            _cut_at_leaving(life, life.cache.by_number[number])


def _cut_at_leaving(life: MachineState, cached: Cached) -> None:
    """Drop the cached blocks of a sequence from its first block on a leaving worker on."""
    spans = clipped(cached.spans, cached.held, cached.stop)
    leaving = [span.start for span in spans if life.ledger.workers[span.worker].retiring]
    if leaving:
        _cut(life, cached, leaving[0])


def worker_lost(life: MachineState, worker: str) -> None:
    """A worker is lost (the ledger knows): drop all cached blocks from its blocks on."""
    life.cache.recent.pop(worker, None)
    lower_tiers.worker_lost(life, worker)
    for cached in list(life.cache.by_number.values()):
        lost = [span.start for span in cached.spans if span.worker == worker]
        if lost and cached.number in life.cache.by_number:
            _break(life, cached, lost[0])


def _break(life: MachineState, cached: Cached, position: int) -> None:
    """A sequence is lost from a position on; shared blocks are dropped with their last sharer."""
    for child in life.cache.beyond(cached.number, position):
        _break(life, child, child.start)
    if cached.held > position:
        cached.closed = True
        life.cache.unindex(cached, 0)
    _cut(life, cached, max(position, cached.held))


def close(life: MachineState) -> None:
    """Stop caching."""
    life.cache.enabled = False
    lower_tiers.close(life)
    for cached in list(life.cache.by_number.values()):
        if cached.number in life.cache.by_number:
            _cut(life, cached, cached.held)


# Bookkeeping


def _cut(life: MachineState, cached: Cached, stop: int) -> None:
    """Drop the cached blocks of a sequence from a position on, and all sequences that build on them."""
    for child in life.cache.beyond(cached.number, stop):
        _cut(life, child, child.start)
    lower_tiers.sources_gone(life, cached.number, stop)
    gone = list(clipped(cached.spans, stop, cached.stop))
    _set_bounds(life, cached, cached.held, stop)
    snapshots.drop_later(life, cached.number, stop)
    there = _there(life, cached)
    for worker in dict.fromkeys(span.worker for span in gone if span.worker in life.ledger.workers):
        if worker not in there:
            life.command(Release(worker, cached.number))
    for span in gone:
        if span.worker in there:
            life.command(Free(span.worker, cached.number, span.start, span.stop))
    if cached.stop == cached.start:
        life.cache.remove(cached)


def _set_bounds(life: MachineState, cached: Cached, held: int, stop: int) -> None:
    """Change how much of a sequence the ledger has, and where it ends; recount its cached blocks."""
    size, recent = life.ledger.block_tokens, life.cache.recent
    earlier = cached.blocks(cached.held, cached.stop, size)
    life.cache.unindex(cached, (stop - cached.start) // size)
    touched, cached.held = held != cached.held, held
    if stop < cached.stop:
        cached.tokens = cached.tokens[: stop - cached.start]
        cached.spans = tuple(clipped(cached.spans, cached.start, stop))
    now = cached.blocks(held, stop, size)
    for worker in earlier | now:
        if worker in life.ledger.workers:
            life.ledger.workers[worker].cached += now[worker] - earlier[worker]
            life.extents.short[worker] = None
        if now[worker]:
            recent[worker][cached.number] = None
        else:
            recent[worker].pop(cached.number, None)
    if touched:
        life.cache.touch(cached.number, life.now)
