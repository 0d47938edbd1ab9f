"""Documents: sequences that are prefilled and then kept, so that others can share their blocks.

A document is waiting, in prefill, stored, or dropped: its blocks were lost or evicted, and are recomputed at its next
question. Its blocks are freed when its handle is released and the last sequence that shares them has ended. The answer
to a question of a chat becomes a document, which shares the blocks of the previous one.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Set

from distkv_dask.errors import InvalidRequestError
from distkv_dask.messages.client_calls import Delivery
from distkv_dask.messages.to_worker import Free
from distkv_dask.scheduler.cache import common, disk, prefix_cache, snapshots
from distkv_dask.scheduler.cache.repair import repaired
from distkv_dask.scheduler.policies.shared_prefix import common_tokens
from distkv_dask.scheduler.records.kinds import Document
from distkv_dask.scheduler.records.machine_state import MachineState
from distkv_dask.scheduler.records.request import Request
from distkv_dask.scheduler.records.states import Dropped, Spilling, State, Stored, Waiting

# Arriving requests


def attach(life: MachineState, request: Request) -> None:
    """Make a request depend on the document that it names.

    Raises
    ------
    InvalidRequestError
        The document does not exist, or no longer exists, or has another adapter.
    """
    document = life.document_of(request)
    if document is None or document.demand is None or document.demand.released:
        raise InvalidRequestError("the document was released: ingest it again to ask more questions")
    if document.adapter_key != request.adapter_key:
        raise InvalidRequestError(
            "the document was computed with another adapter than its question: ask with the adapter of the document, "
            "or ingest it again with this one"
        )
    document.demand.dependents.add(request.sequence)


def borrow(life: MachineState, request: Request) -> None:
    """Let a request without a document share one that is a prefix of its prompt, if there is one."""
    found = life.index.find(request.prompt[: len(request.prompt) - 1], request.adapter_key)
    if found is None or life.requests[found].adapter_key != request.adapter_key:
        return
    demand = life.demand(found)
    if not demand.released:
        request.borrow(found)
        demand.dependents.add(request.sequence)


def share(life: MachineState, request: Request, submitted: float) -> bool:
    """Let a request share its document; False if that is not stored now, so that the request waits for it."""
    assert request.parent is not None
    document, demand = life.requests[request.parent.number], life.demand(request.parent.number)
    if not isinstance(document.state, Stored):
        demand.awaited[request.sequence] = submitted
        if isinstance(document.state, Dropped):
            life.recommend(document, Waiting())
        return False
    demand.used, reuse = life.now, request.reuse
    if request.is_save:
        request.prompt = document.prompt
    own = len(request.prompt) - (not request.is_save)  # a question's last token has to be computed
    reuse.shared = common_tokens(request.prompt[:own], document.prompt, life.ledger.block_tokens)
    if life.ledger.has_states and reuse.shared and not request.is_save:
        reuse.common = reuse.shared
        reuse.begins, reuse.shared = snapshots.nearest(life, document.sequence, reuse.common) or (None, 0)
    return True


# Stored documents


def stored(life: MachineState, request: Request, before: State) -> None:
    """A document is computed: tell its client, and admit questions."""
    life.demand(request.sequence).used = life.now
    if request.prompt:
        life.ledger.make_document(request.sequence, len(request.prompt))
        life.index.add(request.sequence, request.prompt, request.adapter_key)
        if life.ledger.has_states:
            home = life.ledger.sequences[request.sequence].home
            life.snapshots.add(request.sequence, len(request.prompt), home)
    if isinstance(request.kind, Document) and not request.kind.announced:
        request.kind.announced = True
        account = life.ledger.sequences.get(request.sequence)
        placement = account.placement if account is not None else ()
        timings = request.timings(life.now)
        life.command(Delivery(request.sequence, (), "stop", None, timings, placement, request.reuse.shared))
    _wake(life, request)


def become_document(life: MachineState, request: Request, before: State) -> None:
    """A question is answered; whole blocks of both become a document."""
    account, size = life.ledger.sequences[request.sequence], life.ledger.block_tokens
    tokens = account.length // size * size
    request.become_document(tokens)
    life.demand(request.sequence).used = life.now
    if account.lost or account.moves or not tokens:
        life.recommend(request, Dropped())
        return
    life.index.add(request.sequence, request.prompt, request.adapter_key)
    snapshots.keep_only_snapshots(life, request.sequence, account.home, tokens)
    for span in life.ledger.make_document(request.sequence, tokens):
        life.command(Free(span.worker, request.sequence, span.start, span.stop))
    snapshots.make_room(life, account.home)  # perhaps another one, without the last blocks
    _wake(life, request)


def _wake(life: MachineState, request: Request) -> None:
    """A document is stored: requests that waited for it now wait for room."""
    demand = life.demand(request.sequence)
    awaited, demand.awaited = demand.awaited, {}
    for sequence, submitted in awaited.items():
        life.recommend(life.requests[sequence], Waiting(submitted, latest=request.turn.rank))
    life.idle_documents[request.sequence] = None


# Eviction


def drop_blocks(life: MachineState, request: Request, before: State) -> None:
    """Free an idle document's blocks; its tokens are kept to recompute it for waiting requests."""
    defer_questions(life, request)
    free_blocks(life, request)
    if not request.prompt:
        life.recommend(request, Stored())
    elif not is_unneeded(request) and (life.demand(request.sequence).awaited or not request.is_announced):
        life.recommend(request, Waiting())
    life.idle_documents[request.sequence] = None


def stop_waiting(life: MachineState, request: Request, before: State) -> None:
    """Take a document that is no longer awaited out of the queue, and documents that only it awaits."""
    if request.sequence in life.queue:
        life.queue.withdraw(request.sequence)
    document = life.document_of(request)
    if document is not None and life.demand(document.sequence).awaited.pop(request.sequence, None) is not None:
        leave_queue(life, document)
    life.idle_documents[request.sequence] = None


def lost(life: MachineState, request: Request) -> None:
    """An idle document lost blocks: recompute them now if there is room, else all of it at its next question."""
    defer_questions(life, request)
    life.recommend(request, repaired(life, request) or Dropped())


def defer_questions(life: MachineState, request: Request) -> None:
    """Requests that wait for room while sharing a document now wait for the document, or run without it."""
    life.index.drop(request.sequence, request.prompt, request.adapter_key)
    demand = life.demand(request.sequence)
    for ask in [ask for ask in life.queue if ask.document == request.sequence]:
        life.queue.withdraw(ask.sequence)
        if (waiting := life.requests[ask.sequence]).borrows:
            waiting.parent = None
            demand.dependents.discard(ask.sequence)
            life.recommend(waiting, Waiting())
        elif life.ledger.blocks(ask.tokens) > life.queue.limit:
            waiting.alone = True  # it cannot run next to the document, so the document should not be restored for it
            life.recommend(waiting, Waiting(ask.submitted, waiting.turn.rank))
        else:
            demand.awaited[ask.sequence] = ask.submitted


def spill(life: MachineState, request: Request, before: State) -> None:
    """Write a sequence's blocks to lower tiers before they are freed."""
    if request.is_document:
        defer_questions(life, request)
    disk.begin_spill(life, request)


def leave_queue(life: MachineState, request: Request) -> None:
    """Stop waiting for room for a document that is no longer awaited."""
    if isinstance(request.state, Waiting) and request.is_announced and not life.demand(request.sequence).awaited:
        life.recommend(request, Dropped())


def is_unneeded(request: Request) -> bool:
    """Whether a document was released, has no dependents, and is not being computed."""
    demand = request.demand
    unneeded = demand is not None and demand.released and not demand.dependents
    return unneeded and isinstance(request.state, Stored | Dropped)


def remove(life: MachineState, request: Request) -> None:
    """A request or document is finished: free its blocks, and documents that only it needed."""
    life.index.drop(request.sequence, request.prompt if request.is_document else array("i"), request.adapter_key)
    free_blocks(life, request)
    disk.forget_copy(life, request)
    del life.requests[request.sequence]
    leave_document(life, request)


def leave_document(life: MachineState, request: Request) -> None:
    """A request no longer depends on its document."""
    document = life.document_of(request)
    if document is not None:
        demand = life.demand(document.sequence)
        demand.dependents.discard(request.sequence)
        demand.awaited.pop(request.sequence, None)
        demand.used = life.now
        prefix_cache.stop_sharing(life, document.sequence, request.sequence)
        leave_queue(life, document)
        life.idle_documents[document.sequence] = None


def free_blocks(life: MachineState, request: Request) -> None:
    """Free an idle sequence's blocks; those that can be reused are cached."""
    account = life.ledger.sequences.get(request.sequence)
    if account is None:
        return
    life.moves.end(request.sequence)
    common.forget_given(life, request)
    prefix_cache.free_or_cache(life, request)
    for number in account.documents:
        document = life.ledger.sequences.get(number)  # None: it was freed with one that shared it
        if document is not None and document.lost and not document.sharers:
            lost(life, life.requests[number])


# Choice of a document to evict


def evict(life: MachineState) -> bool:
    """Evict the least recently used document for the next request. False if no eviction helps.

    A question whose own document takes the room is answered without it, if nothing else can free room.
    """
    head = next(life.queue.turns(), None)
    smallest = next(life.ledger.room.smallest_batches(), None)
    waits_for_place = smallest is None or not smallest.has_place
    if head is None or (waits_for_place and not life.ledger.has_states):
        return False  # it waits for a place in a batch, which documents do not take
    leaving = about_to_free(life)
    if leaving and room_with(life, leaving) >= life.ledger.blocks(head.tokens):
        return False  # it waits for blocks that are being written to disk
    accounts = life.ledger.sequences
    resting = {number for number in accounts if _rests(life, number)}
    needed = {one for number in accounts.keys() - resting for one in accounts[number].documents}
    if head.document in accounts:
        needed |= {head.document, *accounts[head.document].documents}
    idle = resting - needed
    if life.ledger.has_states and head.document in accounts:  # it waits for a place at its document's home
        idle = {number for number in idle if accounts[number].home == head.home}
    if idle and room_with(life, idle | leaving) >= life.ledger.blocks(head.tokens):
        last = (life.requests[number] for number in idle if not accounts[number].sharers)
        oldest = min(last, key=lambda one: (life.demand(one.sequence).used, one.sequence))
        oldest.turn.behind = life.requests[head.sequence].turn.rank
        comes_back_sooner = oldest.saved is None and not oldest.is_released and disk.pays(life, oldest)
        life.recommend(oldest, Spilling() if comes_back_sooner else Dropped())
        return True
    if head.document is None or len(resting) < len(accounts):
        return False
    life.queue.withdraw(head.sequence)
    life.requests[head.sequence].alone = True
    life.recommend(life.requests[head.sequence], Waiting(head.submitted))
    return True


def about_to_free(life: MachineState) -> set[int]:
    """Sequences whose blocks are about to be freed."""
    again = (number for number in life.ledger.sequences if life.requests[number].goes_on_later)
    return {*again, *life.disks.under_way}


def _rests(life: MachineState, number: int) -> bool:
    """Whether a sequence is a stored document that is not in use."""
    return isinstance(life.requests[number].state, Stored) and not life.ledger.sequences[number].moves


def room_with(life: MachineState, sequences: Iterable[int]) -> int:
    """Blocks that would be free without these sequences."""
    return freed_with(life, set(sequences)) + sum(account.free for account in life.ledger.workers.values())


def freed_with(life: MachineState, sequences: Set[int]) -> int:
    """Blocks that become free with these sequences: their own, and cached ones that no other sequence shares."""
    accounts, owned = life.ledger.sequences, {*sequences}
    for document in {number for one in sequences for number in accounts[one].documents}:
        sharers = (one for one in accounts[document].sharers if not life.requests[one].is_cached)
        if life.requests[document].is_cached and {*sharers} <= sequences:
            owned.add(document)
    return sum(map(life.ledger.own_blocks, owned))
