"""Life of a request: waiting, prefill, decode, end. Pure: events and times go in, commands come out.

One lifecycle serves one engine. It owns the ledger and one chain of decode windows for each home. Blocks of a request
that ends in the middle of something are released only after every worker that may compute on them said that it does not
any more (`Retire`), so that a late write never lands in somebody else's block.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

from distkv_dask.config import Config
from distkv_dask.errors import DistKVError, GangAbortedError, InvalidRequestError
from distkv_dask.protocol import Delivery, Saved, SavedFile, Submission
from distkv_dask.scheduler.admission import Admission
from distkv_dask.scheduler.cache import PrefixCache
from distkv_dask.scheduler.commands import (
    Command,
    Forget,
    Join,
    Reserve,
    Retire,
)
from distkv_dask.scheduler.decoding import WindowChain
from distkv_dask.scheduler.documents import Documents
from distkv_dask.scheduler.draining import moves_away
from distkv_dask.scheduler.gangs import Gangs
from distkv_dask.scheduler.ledger import Ledger
from distkv_dask.scheduler.live import Live
from distkv_dask.scheduler.mending import mended
from distkv_dask.scheduler.moving import Moving
from distkv_dask.scheduler.pacing import Pace, Pacer
from distkv_dask.scheduler.performance import PerformanceModel
from distkv_dask.scheduler.placements import clipped
from distkv_dask.scheduler.policies import policy_named
from distkv_dask.scheduler.preemption import victims
from distkv_dask.scheduler.prefilling import Prefilling
from distkv_dask.scheduler.presets import PRESETS
from distkv_dask.scheduler.refusals import too_large, workers_lost
from distkv_dask.scheduler.reuse import Reuse
from distkv_dask.scheduler.saving import Saving
from distkv_dask.scheduler.spilling import Spilling
from distkv_dask.types import (
    Endpoint,
    FinishReason,
    Gang,
    SamplingParams,
    WindowResult,
)

PRESET = PRESETS["cpu-smollm2"].model
"""Costs of workers that were not timed."""

MAX_RETRIES = 2
"""How often a gang that failed without losing a worker is tried again before its requests fail."""

MAX_LOSSES = 3
"""How many workers a request may lose blocks with before it fails, as Dask's allowed-failures: it may be the cause."""


class Lifecycle:
    """All requests of one engine.

    Parameters
    ----------
    engine
        The engine's id.
    config
        Sizes of blocks, chunks and windows; limits in time.
    gang_numbers
        Numbers unique over all engines of the gManager.
    block_bytes
        Bytes of one block, for messages to users.
    pacer
        The scheduler's budget, where several engines share it.
    """

    def __init__(
        self,
        engine: str,
        config: Config,
        gang_numbers: Iterator[int],
        block_bytes: int = 0,
        pacer: Pacer | None = None,
    ) -> None:
        self.engine = engine
        self.config = config
        self.block_bytes = block_bytes
        self._pacer = Pacer() if pacer is None else pacer
        limit = config.timeout_start / 2  # holders of the next window wait while this one runs
        self._pace = Pace(
            watched=min(config.window_stream_seconds, limit),
            unwatched=min(config.window_seconds, limit),
            longest=min(config.window_max_seconds, limit),
            share=config.window_scheduler_share,
        )
        self.ledger = Ledger(config.block_tokens, config.window_batch)
        self.policy = policy_named(config.policy, PRESET)
        self.live: dict[int, Live] = {}
        self.chains: dict[str, WindowChain] = {}
        self._queue = Admission(self.ledger, self.policy, lambda document: self.documents.ready(document))
        self.cache = PrefixCache(
            self.ledger, self.live, lambda document: self.documents.ready(document), config.prefix_cache
        )
        self._reuse = Reuse(self.cache, self.ledger, self.live, self._queue)
        self.spilling = Spilling(self.ledger, self.live, lambda: self.block_bytes)
        self.documents = Documents(
            self.ledger,
            self.live,
            self._queue,
            self.spilling,
            self.cache,
            lambda number: self.moving.forget(number),
            self._document_lost,
        )
        self._gangs = Gangs(engine, gang_numbers, self.ledger)
        self.prefilling = Prefilling(self.ledger, self.live, self._gangs, config.prefill_chunk_tokens)
        self._largest_blocks = 0
        self._lowest_priority = math.inf
        self._ending = False
        self._leaving: set[str] = set()
        self._ordinals: dict[str, int] = {}
        self._saving = Saving(
            self.ledger,
            self.live,
            self.documents,
            self.spilling,
            self.prefilling,
            self._end,
            self._forget,
            self._join,
        )
        self.moving = Moving(
            self.ledger, self.live, self.chains, config, self._join, self.cache.make_room, gang_numbers
        )

    def know_costs(self, model: PerformanceModel) -> None:
        """Let the policy decide by this model from now on."""
        self.policy = self._queue.policy = replace(self.policy, model=model)

    # Events: workers

    def worker_ready(
        self, endpoint: Endpoint, capacity: int, now: float, *, can_decode: bool = True, spill_bytes: int = 0
    ) -> Iterator[Command]:
        """A worker allocated a pool of ``capacity`` blocks and loaded the model, if it is no memory worker.

        It has ``spill_bytes`` bytes of disk for blocks that make room.
        """
        worker = endpoint.worker
        if worker in self.ledger.workers:
            return
        self.spilling.worker_ready(worker, spill_bytes)
        lends = int(capacity * self.config.lend_limit) if can_decode else capacity
        self.ledger.add_worker(endpoint, capacity, lend_limit=lends, can_decode=can_decode)
        self._largest_blocks = max(self._largest_blocks, self.policy.limit(self.ledger))
        ordinal = self._ordinals.setdefault(worker, len(self._ordinals))
        self.chains[worker] = WindowChain(
            worker,
            partial(self._decode_gang, worker, ordinal),
            partial(self._window_seconds, worker),
            lambda sequence: self.live[sequence].remaining,
            self.config.window_steps,
        )
        yield from self._go_on(now)

    def worker_lost(self, worker: str, now: float) -> Iterator[Command]:
        """A worker died or left: what lay on it is computed anew, and all requests go on from their last commit."""
        if worker not in self.ledger.workers:
            return
        lost = [number for number in self.ledger.remove_worker(worker) if self.live[number].state != "retiring"]
        yield from self.cache.worker_lost(worker)
        self._leaving.discard(worker)
        chain = self.chains.pop(worker)
        for gang in chain.gangs():
            yield from self._gangs.abandon(gang, f"home {worker} is gone")
        yield from self.moving.worker_lost(worker, lost)
        yield from self.spilling.worker_lost(worker)
        for other in self.chains.values():
            if any(holder.worker == worker for holder in other.holders()):
                yield from self._restart_chain(other, f"holder {worker} is gone", but=lost, now=now)
        for sequence in lost:
            if sequence in self.ledger.sequences:
                yield from self._sequence_lost(self.live[sequence], worker, now)
        for sequence, live in list(self.live.items()):
            if live.state == "retiring":
                yield from self.retired(sequence, worker, now)
        yield from self._go_on(now)

    def _sequence_lost(self, live: Live, worker: str, now: float) -> Iterator[Command]:
        """A sequence lost blocks: it is computed anew, a document when it is next asked."""
        if live.state == "retiring":
            return
        if live.state == "spilling":
            yield from self._saving.lost(live, worker, now)
        elif not live.is_document:
            live.lost.append(worker)
            live.answering.discard(worker)
            if live.saves or len(live.lost) > MAX_LOSSES:
                yield from self._end(live.sequence, "error", now, workers_lost(live))
            else:
                yield from self._compute_again(live, now)
        elif live.state in ("prefill", "fetching"):
            live.answering.discard(worker)
            yield from self._stop_prefill(live, "a worker with blocks of the document is gone", now)
        elif not self.ledger.sequences[live.sequence].sharers:  # else with the last of them
            yield from self._document_lost(live, now)

    def _document_lost(self, live: Live, now: float) -> Iterator[Command]:
        """A document at rest lost blocks: they are computed now if there is room, else all of it when it is asked."""
        self.documents.put_off(live, now)
        yield from self._mend(live) or self.documents.drop(live, now)

    def _mend(self, live: Live) -> list[Command]:
        """Compute just what a sequence lost, elsewhere; nothing if there is no room for that now, or files have it."""
        if live.released or live.saved is not None or not self.ledger.sequences[live.sequence].lost:
            return []
        placement = mended(self.ledger, self.policy, live)
        if placement is None:
            return []
        account, number = self.ledger.sequences[live.sequence], live.sequence
        length = account.length
        computed = clipped(account.placement, 0, length)
        lost = [(span.start, span.stop) for span in computed if span.worker in account.lost]
        self.ledger.commit(number, min([length, *(start for start, _ in lost)]))
        self.ledger.mend(number, placement)
        commands = list(self._reserve(number))
        if lost or length < live.known_tokens:
            live.state, live.retries = "prefill", 0
            commands.append(self.prefilling.begin(live, length, lost))
        else:  # only room was lost
            live.state = "decode"
            commands += self._join(live)
        return commands

    def _compute_again(self, live: Live, now: float) -> Iterator[Command]:
        """Free what is left of a request's blocks, once nobody computes on them, and let it wait for room again."""
        self.moving.forget(live.sequence)
        yield from self.prefilling.stop(live, f"a worker with blocks of the request is gone: {live.lost[-1]}")
        live.again = True
        yield from self._retire_computing(live, now)

    def drain(self, worker: str, leaving: bool, now: float) -> Iterator[Command]:
        """A worker is about to leave: move its blocks away and place nothing on it (or it stays after all)."""
        if worker in self.ledger.workers:
            (self._leaving.add if leaving else self._leaving.discard)(worker)
            self.ledger.retire_worker(worker, leaving)
            yield from self.cache.drain(worker)
            yield from self._go_on(now)

    def is_drained(self, worker: str) -> bool:
        """Whether a worker has no blocks (any more)."""
        return worker not in self.ledger.workers or not self.ledger.workers[worker].held

    # Events: moves

    def move_expected(self, number: int, refusal: str, now: float) -> Iterator[Command]:
        """The target of a move allocated its blocks, or refused."""
        yield from self.moving.expected(number, refusal, now)
        yield from self._go_on(now)

    def move_sent(self, number: int, failure: str, now: float) -> Iterator[Command]:
        """The source of a move has copied its blocks, or failed to."""
        yield from self.moving.sent(number, failure, now)
        yield from self._go_on(now)

    def relocated(self, number: int, now: float) -> Iterator[Command]:
        """A home uses a sequence's old placement no more."""
        yield from self.moving.relocated(number)
        yield from self._go_on(now)

    def _go_on(self, now: float) -> Iterator[Command]:
        """Room or a worker has become free: admit requests, then move blocks."""
        yield from self._admit(now)
        for worker in sorted(self._leaving):
            if not self.moving.busy(worker):
                yield from self._move_away(worker, now)
        for move in self.policy.moves(self.ledger, self._queue):
            if self.moving.can_start(move):
                yield from self.moving.start(move, now)

    def _move_away(self, worker: str, now: float) -> Iterator[Command]:
        whole = (n for n in self.ledger.workers[worker].held if not self.ledger.sequences[n].lost)
        held = [n for n in whole if self.live[n].state in ("decode", "document")]
        full = {number: self.moving.full_tokens(number) for number in held}
        for move, pause in moves_away(self.ledger, worker, full, self.config.window_batch):
            if self.moving.can_start(move, pause=pause):
                yield from self.moving.start(move, now)
                return

    # Events: requests

    def submit(
        self,
        sequence: int,
        prompt: array[int],
        sampling: SamplingParams,
        now: float,
        streamed: bool = False,
        document: int | None = None,
        keeps: bool = False,
    ) -> Iterator[Command]:
        """A client asks for a completion; ``streamed`` when somebody reads along.

        What the prompt begins with is taken from ``document``, if one is named. With ``keeps`` prompt and answer become
        a document.

        Raises
        ------
        CapacityError
            When the request is larger than the pools of all workers together ever were. (If workers are missing just
            now, it waits for them, but not for ever: :meth:`expire`.)
        InvalidRequestError
            The document was released.
        """
        live = Live(
            sequence, prompt, sampling, submitted=now, streamed=streamed, document=document, keeps=keeps
        )  # fmt: skip
        return self._accept(live, now)

    def accept(self, one: Submission, now: float) -> Iterator[Command]:
        """Take a request of any kind; raises as :meth:`submit` does."""
        if one.sampling is not None:
            return self.submit(one.number, one.prompt, one.sampling, now, one.streamed, one.document, one.keeps)
        if one.document is not None and one.saved is not None:
            return self.save(one.number, one.document, one.saved, now)
        return self.ingest(one.number, one.prompt, now, one.saved, one.name)

    def save(self, number: int, document: int, saved: Saved, now: float) -> Iterator[Command]:
        """A client wants a document in files.

        Raises
        ------
        InvalidRequestError
            The document was released.
        """
        live = Live(
            number, array("i"), SamplingParams(), submitted=now, document=document, saves=True, saved=saved
        )  # fmt: skip
        of = self.live.get(document)
        if of is not None and of.state == "document" and not of.prompt:
            return iter([Delivery(number, (), "stop")])  # it is shorter than a block
        return self._accept(live, now)

    def ingest(
        self, sequence: int, prompt: array[int], now: float, saved: Saved | None = None, name: str = ""
    ) -> Iterator[Command]:
        """A client hands in a document: whole blocks of it are computed, or read, and kept until it is stopped.

        Raises
        ------
        CapacityError
            As for :meth:`submit`.
        """
        whole = prompt[: len(prompt) // self.config.block_tokens * self.config.block_tokens]
        live = Live(sequence, whole, SamplingParams(), submitted=now, is_document=True, saved=saved, name=name)
        if not whole:
            self.live[sequence] = live
            return self.documents.stored(live, now)
        return self._accept(live, now)

    def saved(
        self, number: int, worker: str, files: tuple[SavedFile, ...], error: Exception | None, now: float
    ) -> Iterator[Command]:
        """A worker wrote its part of a document, or of a sequence that is spilled, or could not."""
        yield from self._saving.stored(number, worker, files, error, now)
        yield from self._go_on(now)

    def fetched(self, number: int, worker: str, error: Exception | None, now: float) -> Iterator[Command]:
        """A worker read its part of a sequence, or could not."""
        live = self.live.get(number)
        if live is not None and live.state == "retiring" and worker in live.answering:
            live.answering.discard(worker)
            yield from self.retired(number, worker, now)
            return
        yield from self._saving.fetched(number, worker, error, now)
        yield from self._go_on(now)

    def _accept(self, live: Live, now: float) -> Iterator[Command]:
        if self.ledger.blocks(live.tokens) > self._largest_blocks:
            raise self._too_large(live)
        self.documents.attach(live)
        self.live[live.sequence] = live
        self._lowest_priority = min(self._lowest_priority, live.sampling.priority)
        self.documents.enqueue(live, now)
        return self._admit(now)

    def stop(self, sequence: int, reason: FinishReason, now: float) -> Iterator[Command]:
        """The client wants no more of a request: cancelled, or at a stop string (no error if it ended meanwhile)."""
        live = self.live.get(sequence)
        if live is None:
            return
        live.released |= reason == "cancelled"
        if live.is_document and not live.dependents:
            yield from self._end_document(live, now)
        elif not live.is_document and live.ended is None:
            yield from self._end(sequence, reason, now)

    def stop_all(self, now: float) -> Iterator[Command]:
        """The engine closes: end every request and admit no more."""
        self._ending = True
        yield from self.cache.close()
        for sequence in list(self.live):
            yield from self.stop(sequence, "cancelled", now)

    def expire(self, now: float) -> Iterator[Command]:
        """End what waits for something that does not come.

        Waiting requests that no remaining worker could ever serve, once replacements had time to come; and windows that
        Dask does not start, because their home is paused for its memory or busy with other tasks.
        """
        self._count_tasks()
        for chain in list(self.chains.values()):
            late = chain.late(now, self.config.timeout_start)
            if late is not None:
                text = f"home {chain.home} did not start window {late.name} within {self.config.timeout_start:g} s"
                hint = "(distkv.timeouts.start): Dask paused it for its memory, or it is busy with other tasks"
                yield from self.gang_failed(late.number, GangAbortedError(f"{text} {hint}"), now)
        yield from self.moving.expire(now)
        yield from self._saving.expire(now, self.config.timeout_start)
        yield from self._go_on(now)
        limit = self.policy.limit(self.ledger)
        for ask in list(self._queue):
            sequence, live = ask.sequence, self.live[ask.sequence]
            if self.ledger.blocks(live.tokens) <= limit:
                live.stuck_since = None
            elif live.stuck_since is None:
                live.stuck_since = now
            elif now - live.stuck_since > self.config.timeout_open:
                yield from self._end(sequence, "error", now, self._too_large(live))

    # Events: gangs

    def chunk_done(self, sequence: int, gang: int, now: float) -> Iterator[Command]:
        """A worker finished a chunk after which no token was drawn."""
        live = self.live.get(sequence)
        if live is None or gang not in live.chunks:
            return
        chunk = live.chunks.pop(gang)
        self.ledger.commit(sequence, chunk.start + len(chunk.tokens) if live.chunks else live.known_tokens)
        self._pacer.prefilled(1 + len(chunk.gang.holders))
        yield Forget(chunk.gang, finished=True)
        if live.chunks or not (live.is_document or live.generated):
            return
        self.prefilling.ended(sequence)
        if live.is_document:
            yield from self.documents.stored(live, now)
        else:  # it lost blocks while it decoded
            live.retries, live.state = 0, "decode"
            yield from self._join(live)
        yield from self._go_on(now)

    def prefilled(
        self, sequence: int, gang: int, token: int, reason: FinishReason | None, now: float
    ) -> Iterator[Command]:
        """A prompt's last chunk is done and its first token drawn (not drawn when ``reason`` is "stop")."""
        live = self.live.get(sequence)
        if live is None or gang not in live.chunks:
            return
        yield from self.chunk_done(sequence, gang, now)
        self.prefilling.ended(sequence)
        live.decoding = now
        live.retries = 0
        if reason != "stop":
            live.generated.append(token)
            yield Delivery(sequence, (token,))
        if reason is not None:
            yield from self._end(sequence, reason, now, settled=True)
            return
        live.state = "decode"
        yield from self._join(live)
        yield from self._go_on(now)

    def window_started(self, home: str, number: int) -> Iterator[Command]:
        """A home began a window."""
        if home in self.chains:
            yield from self.chains[home].started(number)

    def window_done(
        self, home: str, number: int, epoch: int, result: WindowResult, used: tuple[str, ...], now: float
    ) -> Iterator[Command]:
        """A home finished a window: its tokens are committed here, or never."""
        chain = self.chains.get(home)
        settled = chain.done(number, used, result) if chain is not None and chain.epoch == epoch else None
        if chain is None or settled is None:
            return
        yield from settled
        if result.steps:
            self.moving.stepped(home, result.seconds / result.steps)
        for sequence, tokens in result.tokens.items():
            live = self.live.get(sequence)
            if live is None or live.state != "decode":
                continue
            live.generated.extend(tokens)
            self.ledger.commit(sequence, live.known_tokens)
            if tokens:
                yield Delivery(sequence, tuple(tokens))
            if sequence in result.finished:
                yield from self._end(sequence, result.finished[sequence], now, settled=True)
        yield from chain.pump()
        yield from self._go_on(now)

    def gang_failed(self, gang: int, error: Exception, now: float) -> Iterator[Command]:
        """A member of a gang failed while all its workers live: try again a few times, then fail its requests."""
        again = isinstance(error, (GangAbortedError, ConnectionError))
        for live in self.live.values():
            if gang in live.chunks:
                yield from self._prefill_failed(live, error, again, now)
                return
        for chain in self.chains.values():
            if any(one.number == gang for one in chain.gangs()):
                chain.failures += 1
                failed = [] if again and chain.failures <= MAX_RETRIES else list(chain.sequences)
                yield from self._restart_chain(chain, str(error), but=failed, now=now)
                for sequence in failed:
                    yield from self._end(sequence, "error", now, error)
                if failed:
                    chain.failures = 0
                return

    def retired(self, sequence: int, worker: str, now: float) -> Iterator[Command]:
        """A worker computes on a sequence no more.

        First those that run its forwards are waited for; then all of its holders, so that none has a frame of them left
        to answer; then its blocks are freed.
        """
        live = self.live.get(sequence)
        if live is None or live.state != "retiring":
            yield from self.moving.paused(sequence, worker, now)
            return
        live.retiring.discard(worker)
        if live.retiring:
            return
        if not live.forwards_ended:
            live.forwards_ended = True
            yield from self._retire(live, {*self.ledger.sequences[sequence].workers()})
        if not live.retiring:
            yield from self._release(sequence, now)
            yield from self._go_on(now)

    def _retire(self, live: Live, workers: set[str]) -> Iterator[Command]:
        live.retiring = {worker for worker in workers if worker in self.ledger.workers}
        for worker in tuple(live.retiring):
            yield Retire(worker, live.sequence)

    # Admission and prefill

    def _admit(self, now: float) -> Iterator[Command]:
        while self._queue and not self._ending and self.prefilling.has_room:
            admitted = self._queue.admit()
            if admitted is None:
                evicted = self.documents.evict(now)
                if evicted is None:
                    evicted = self._preempt(now)
                if evicted is None:
                    return
                yield from evicted
                continue
            ask, placement = admitted
            live = self.live[ask.sequence]
            ask = self._reuse.share(live, ask, placement, now)
            live.state, live.admitted = "prefill", live.admitted or now
            yield from self._reserve(live.sequence)
            if live.saved is not None:
                yield from self._saving.begin(live)
                continue
            yield self.prefilling.begin(live, ask.shared)

    def _reserve(self, sequence: int) -> Iterator[Command]:
        """Let the workers allocate what the ledger reserved for a sequence; cached blocks go first."""
        for span in self.ledger.sequences[sequence].own:
            yield from self.cache.make_room(span.worker)
            yield Reserve(span.worker, sequence, span.start, span.stop)

    def _preempt(self, now: float) -> list[Command] | None:
        """Let running requests make way for the one whose turn it is, if it is more urgent and that helps."""
        head = next(iter(self._queue))
        if head.priority <= self._lowest_priority:
            return None  # as always where nobody uses priorities
        if head.document is not None and not self.documents.ready(head.document):
            return None
        going = self.documents.going()
        need = self.ledger.blocks(head.tokens) - self.documents.room_with(going)
        if need <= 0 and going:
            return None  # one at a time where it does not fit for another reason
        chosen = victims(self.ledger, self.live, head, need)
        commands: list[Command] = []
        for number in chosen:
            live = self.live[number]
            self.chains[self.ledger.sequences[number].home].leave(number)
            live.again = True
            commands += self._retire_computing(live, now)
        return commands if chosen else None

    def _prefill_failed(self, live: Live, error: Exception, again: bool, now: float) -> Iterator[Command]:
        if not again or live.retries >= MAX_RETRIES:
            yield from self._end(live.sequence, "error", now, error)
            return
        live.retries += 1
        yield from self.prefilling.again(live, str(error))

    # Decode

    def _join(self, live: Live) -> Iterator[Command]:
        account = self.ledger.sequences[live.sequence]
        placement = self.moving.placement(live.sequence)
        holders = tuple(self.ledger.holders(placement, but=account.home))
        yield Join(account.home, live.state_at(placement, account.length), holders)
        yield from self.chains[account.home].join(live.sequence, holders)

    def _window_seconds(self, home: str) -> float:
        """Length of a home's next window."""
        self._count_tasks()
        watched = (
            bool(self._queue)  # for room, which sequences that stop will free
            or any(self.live[sequence].streamed for sequence in self.chains[home].sequences)
            or self.prefilling.awaited_by(home)
        )
        return self._pacer.window_seconds(self._pace, watched)

    def _count_tasks(self) -> None:
        """Tell the pacer how many tasks one window of each home takes now."""
        self._pacer.rounds[self.engine] = sum(chain.tasks for chain in self.chains.values())

    def _restart_chain(self, chain: WindowChain, reason: str, but: list[int], now: float) -> Iterator[Command]:
        """Abort a home's windows and begin a new chain with the committed state of its sequences (but some)."""
        again = [number for number in chain.sequences if number not in but]
        yield from chain.break_(reason, self.ledger.workers.__contains__)
        for sequence in again:
            yield from self._join(self.live[sequence])

    # Ends

    def _end(
        self,
        sequence: int,
        reason: FinishReason,
        now: float,
        error: Exception | None = None,
        *,
        settled: bool = False,
    ) -> Iterator[Command]:
        """Tell the client, and free the blocks: at once when nobody computes on them (``settled``), else later."""
        live = self.live[sequence]
        if live.is_document:
            yield from self._end_document(live, now, error)
            return
        account = self.ledger.sequences.get(sequence)
        placement = account.placement if account is not None else ()
        yield Delivery(sequence, (), reason, error, live.timings(now), placement, live.reused)
        self.moving.forget(sequence)
        live.ended = reason
        if live.again:  # it retires already
            live.again = False
            return
        if account is None:
            if sequence in self._queue:
                self._queue.withdraw(sequence)
            yield from self._forget(live, now, error)
            yield from self._admit(now)
            return
        yield from self.prefilling.stop(live, f"the request ended: {error or reason}")
        if account.home in self.chains:
            self.chains[account.home].leave(sequence)
        if settled or live.saves:
            self._saving.forget(sequence)
            yield from self._release(sequence, now)
            yield from self._admit(now)
            return
        yield from self._retire_computing(live, now)

    def _retire_computing(self, live: Live, now: float) -> Iterator[Command]:
        """Let the workers that run forwards of a sequence, then its holders, say that they compute on it no more."""
        account, fetching = self.ledger.sequences[live.sequence], live.state == "fetching"
        computing = {account.home} if live.state == "decode" else {*account.workers()}
        live.state, live.forwards_ended = "retiring", fetching
        if fetching:  # who still reads files says so by FETCHED
            live.retiring = set(live.answering)
        else:
            yield from self._retire(live, computing)
        if not live.retiring:
            yield from self.retired(live.sequence, "", now)

    def _end_document(self, live: Live, now: float, error: Exception | None = None) -> Iterator[Command]:
        """A document is needed no more, or could not be computed: then who waits for it fails with it."""
        if not live.announced:
            yield Delivery(live.sequence, (), "cancelled" if error is None else "error", error, live.timings(now))
            live.announced = live.released = True
        if error is not None:
            yield from self._fail_awaited(live, now, error)
        if live.state == "waiting":
            if live.sequence in self._queue:
                self._queue.withdraw(live.sequence)
            live.state = "dropped"
        if live.state in ("prefill", "fetching"):
            yield from self._stop_prefill(live, f"the document ended: {error or 'released'}", now)
        elif live.sequence in self.live:
            yield from self.documents.unneeded(live, now)
        yield from self._admit(now)

    def _stop_prefill(self, live: Live, reason: str, now: float) -> Iterator[Command]:
        """Compute no more on a document; its blocks are freed once nobody does."""
        yield from self.prefilling.stop(live, reason)
        yield from self._retire_computing(live, now)

    def _release(self, sequence: int, now: float) -> Iterator[Command]:
        """Nothing computes on a sequence any more: free its blocks, or keep what is a document from now on."""
        live = self.live[sequence]
        if live.is_document:
            live.forwards_ended, live.retries = False, 0
            yield from self._mend(live) or self.documents.drop(live, now)
        elif live.again and (commands := self._mend(live)):
            live.again = False
            yield from commands
        elif live.again and self.spilling.pays(live, self.policy.model):
            yield from self.spilling.begin(live, now)
        elif live.again:
            live.again = False
            yield from self.documents.give_back(live, now)
        elif live.keeps and live.ended in ("stop", "length"):
            yield from self.documents.kept(live, now)
        else:
            yield from self._forget(live, now)

    def _forget(self, live: Live, now: float, error: Exception | None = None) -> Iterator[Command]:
        """A request is over, and nothing is kept of it."""
        lost = InvalidRequestError("the answer that this question builds on was not finished: ask that one again")
        yield from self._fail_awaited(live, now, error or lost)
        yield from self.documents.forget(live, now)

    def _fail_awaited(self, live: Live, now: float, error: Exception) -> Iterator[Command]:
        for sequence in tuple(live.awaited):
            yield from self._end(sequence, "error", now, error)

    def _decode_gang(self, home: str, ordinal: int, window: int, epoch: int, holders: tuple[Endpoint, ...]) -> Gang:
        return self._gangs.new("decode", ordinal, window, epoch, home, holders)

    def _too_large(self, live: Live) -> DistKVError:
        return too_large(live, self.ledger, self.policy, self.block_bytes)
