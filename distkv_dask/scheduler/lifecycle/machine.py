"""Life of a request: waiting, prefill, decode, end. Pure: events and times go in, commands come out.

One lifecycle serves one engine. It owns the ledger and what the others share, and says who sees to which event: how
prompts are computed, how homes decode, what ends and what is lost is each in a module of its own.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Set
from dataclasses import replace

from distkv_dask.config import Config
from distkv_dask.errors import DistKVError
from distkv_dask.protocol import Delivery, Saved, SavedFile, Submission
from distkv_dask.scheduler.commands import Command, Forget
from distkv_dask.scheduler.costs.calibration import Calibration
from distkv_dask.scheduler.costs.model import PerformanceModel
from distkv_dask.scheduler.costs.presets import PRESETS
from distkv_dask.scheduler.kept.disk import Spilling
from distkv_dask.scheduler.kept.documents import Documents
from distkv_dask.scheduler.kept.files import Saving
from distkv_dask.scheduler.kept.prefix_cache import PrefixCache
from distkv_dask.scheduler.kept.reuse import Reuse
from distkv_dask.scheduler.ledger.ledger import Ledger
from distkv_dask.scheduler.lifecycle.ends import Ending
from distkv_dask.scheduler.lifecycle.losses import Losses
from distkv_dask.scheduler.lifecycle.preemption import Preemption
from distkv_dask.scheduler.lifecycle.refusals import too_large, waited_in_vain
from distkv_dask.scheduler.lifecycle.repair import Mending
from distkv_dask.scheduler.lifecycle.request import Live
from distkv_dask.scheduler.lifecycle.retirement import Retiring
from distkv_dask.scheduler.lifecycle.retries import Retrying
from distkv_dask.scheduler.lifecycle.stalls import held_blocks, waiting_in_vain
from distkv_dask.scheduler.moves.draining import Draining
from distkv_dask.scheduler.moves.moving import Moving
from distkv_dask.scheduler.policies import policy_named
from distkv_dask.scheduler.policies.queue import Admission
from distkv_dask.scheduler.work.gangs import Gangs
from distkv_dask.scheduler.work.homes import Homes
from distkv_dask.scheduler.work.pacing import Pacer
from distkv_dask.scheduler.work.prefill import Prefilling
from distkv_dask.scheduler.work.starts import Starts
from distkv_dask.types import Endpoint, FinishReason, SamplingParams, WindowResult

PRESET = PRESETS["cpu-smollm2"].model
"""Costs of workers that were not timed."""


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
        self._largest_blocks = 0
        self._closing = False
        self.ledger = Ledger(config.block_tokens, config.window_batch)
        self.policy = policy_named(config.policy, PRESET)
        self.calibration = Calibration(self.ledger)
        self.live: dict[int, Live] = {}
        self._queue = Admission(self.ledger, self.policy, lambda document: self.documents.ready(document))
        self.cache = PrefixCache(
            self.ledger, self.live, lambda document: self.documents.ready(document), config.prefix_cache
        )
        self._reuse = Reuse(self.cache, self.ledger, self.live, self._queue)
        self.spilling = Spilling(self.ledger, self.live, lambda: self.block_bytes)
        gangs = Gangs(engine, gang_numbers, self.ledger)
        self.prefilling = Prefilling(self.ledger, self.live, gangs, config.prefill_chunk_tokens)
        self._starts = Starts(self.prefilling, config.timeout_start)
        self._homes = Homes(
            engine,
            config,
            self.ledger,
            self.live,
            self._queue,
            gangs,
            self.prefilling,
            lambda sequence: self.moving.placement(sequence),
            self._pacer,
        )
        self.chains = self._homes.chains
        self.moving = Moving(self.ledger, self.live, self._homes, config, self.cache.make_room, gang_numbers)
        self._draining = Draining(self.ledger, self.live, self.moving, config.window_batch)
        mending = Mending(self.ledger, self._queue, self.cache, self.prefilling, self._homes)
        self.documents = Documents(
            self.ledger, self.live, self._queue, self.spilling, self.cache, self.moving.forget, mending.mend
        )
        self._retiring = Retiring(
            self.ledger,
            self._queue,
            self.documents,
            self.spilling,
            mending,
            lambda live, now: self._ending.forget(live, now),
            self._go_on,
        )
        self._preemption = Preemption(self.ledger, self.live, self._queue, self.documents, self._homes, self._retiring)
        self._ending = Ending(
            self.ledger,
            self.live,
            self._queue,
            self._homes,
            self.prefilling,
            self.moving,
            self.documents,
            self._retiring,
            lambda sequence: self._saving.forget(sequence),
            self._admit,
        )
        self._saving = Saving(
            self.ledger, self.live, self.documents, self.spilling, self.prefilling, self._homes, self._ending
        )
        self._retrying = Retrying(
            self.ledger, self.live, self._homes, self.prefilling, self._ending, config.timeout_receive
        )
        self._losses = Losses(
            self.ledger, self.documents, self._saving, self.prefilling, self.moving, self._retiring, self._ending
        )

    def know_costs(self, model: PerformanceModel) -> None:
        """Let the policy decide by this model from now on, calibrated by what windows take."""
        self.policy = self._queue.policy = replace(self.policy, model=self.calibration.follow(model))

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
        self._homes.add(worker)
        yield from self._go_on(now)

    def worker_lost(self, worker: str, now: float) -> Iterator[Command]:
        """A worker died or left: what lay on it is computed anew, and all requests go on from their last commit."""
        if worker not in self.ledger.workers:
            return
        lost = [number for number in self.ledger.remove_worker(worker) if self.live[number].state != "retiring"]
        yield from self.cache.worker_lost(worker)
        self.calibration.forget(worker)
        self._draining.worker_lost(worker)
        yield from self._homes.remove(worker)
        yield from self.moving.worker_lost(worker, lost)
        yield from self.spilling.worker_lost(worker)
        yield from self._homes.holder_lost(worker, lost)
        for sequence in lost:
            if sequence in self.ledger.sequences:
                yield from self._losses.lost(self.live[sequence], worker, now)
        for sequence, live in list(self.live.items()):
            if live.state == "retiring":
                yield from self.retired(sequence, worker, now)
        yield from self._go_on(now)

    def drain(self, worker: str, leaving: bool, now: float) -> Iterator[Command]:
        """A worker is about to leave: move its blocks away and place nothing on it (or it stays after all)."""
        if worker in self.ledger.workers:
            self._draining.drain(worker, leaving)
            self._largest_blocks = max(self._largest_blocks, self.policy.limit(self.ledger))
            yield from self.cache.drain(worker)
            yield from self._go_on(now)

    def pause(self, paused: Set[str], now: float) -> Iterator[Command]:
        """Dask has paused these workers for their memory, and no others."""
        if self._draining.pause(paused):
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
        yield from self._draining.start_moves(now)
        for move in self.policy.moves(self.ledger, self._queue.turns()):
            if self.moving.can_start(move):
                yield from self.moving.start(move, now)

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
            yield from self._retiring.retired(live, worker, now)
            return
        yield from self._saving.fetched(number, worker, error, now)
        yield from self._go_on(now)

    def _accept(self, live: Live, now: float) -> Iterator[Command]:
        if self.ledger.blocks(live.tokens) > self._largest_blocks:
            raise self._too_large(live)
        self.documents.attach(live)
        self.live[live.sequence] = live
        self._preemption.accepted(live.sampling.priority)
        self.documents.enqueue(live, now)
        return self._admit(now)

    def stop(self, sequence: int, reason: FinishReason, now: float) -> Iterator[Command]:
        """The client wants no more of a request: cancelled, or at a stop string (no error if it ended meanwhile)."""
        live = self.live.get(sequence)
        if live is None:
            return
        live.released |= reason == "cancelled"
        if live.is_document and not live.dependents:
            yield from self._ending.end_document(live, now)
        elif not live.is_document and live.ended is None:
            yield from self._ending.end(sequence, reason, now)

    def stop_all(self, now: float) -> Iterator[Command]:
        """The engine closes: end every request and admit no more."""
        self._closing = True
        yield from self.cache.close()
        for sequence in list(self.live):
            yield from self.stop(sequence, "cancelled", now)

    def expire(self, now: float) -> Iterator[Command]:
        """End what waits for something that does not come.

        Requests that have been set aside, once replacements of lost workers had time to come; windows and chunks that
        Dask does not start, because their worker is paused for its memory or busy with other tasks.
        """
        self._homes.count_tasks()
        for gang, error in self._homes.late(now):
            yield from self.gang_failed(gang.number, error, now)
        for chunk, error in self._starts.late(now):
            yield from self._losses.stalled(self.live[chunk.sequence], error, now)
        yield from self._retrying.wake(now)
        yield from self.moving.expire(now)
        yield from self._saving.expire(now, self.config.timeout_start)
        self._queue.hold(held_blocks(self.ledger, self.live, now, self.config.timeout_receive))
        yield from self._go_on(now)
        limit = self.config.timeout_open
        for live, reason in waiting_in_vain(self._queue, self.live, now, limit):
            large = self.ledger.blocks(live.tokens) > self.policy.limit(self.ledger)
            refusal = self._too_large(live) if large else waited_in_vain(live, reason, limit)
            yield from self._ending.end(live.sequence, "error", now, refusal)

    def aside(self, live: Live) -> str:
        """Why a waiting request is set aside while others run (or its document is); empty if it is not."""
        if live.sequence in self._queue:
            return self._queue.aside(self._queue.ask(live.sequence))
        document = self.live.get(live.document) if live.document is not None else None
        if live.state != "waiting" or document is None:
            return ""
        return self.aside(document)

    # Events: gangs

    def chunk_started(self, gang: int) -> None:
        """A worker began a chunk."""
        self._starts.chunk_began(gang)

    def chunk_done(self, sequence: int, gang: int, now: float) -> Iterator[Command]:
        """A worker finished a chunk after which no token was drawn."""
        live = self.live.get(sequence)
        if live is None or gang not in live.chunks:
            return
        chunk = live.chunks.pop(gang)
        live.retries = 0
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
            yield from self._homes.join(live)
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
            yield from self._ending.end(sequence, reason, now, settled=True)
            return
        live.state = "decode"
        yield from self._homes.join(live)
        yield from self._go_on(now)

    def window_started(self, home: str, number: int) -> Iterator[Command]:
        """A home began a window."""
        self._starts.window_began(home)
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
            self.calibration.observe(home, result)
        for sequence, tokens in result.tokens.items():
            live = self.live.get(sequence)
            if live is None or live.state != "decode":
                continue
            live.generated.extend(tokens)
            self.ledger.commit(sequence, live.known_tokens)
            if tokens:
                yield Delivery(sequence, tuple(tokens))
            if sequence in result.finished:
                error = result.errors.get(sequence)
                yield from self._ending.end(sequence, result.finished[sequence], now, error, settled=True)
        yield from chain.pump()
        yield from self._go_on(now)

    def is_under_way(self, gang: int) -> bool:
        """Whether a chunk or window is still waited for."""
        if any(gang in live.chunks for live in self.live.values()):
            return True
        return any(one.number == gang for chain in self.chains.values() for one in chain.gangs())

    def gang_failed(self, gang: int, error: Exception, now: float) -> Iterator[Command]:
        """A member of a gang failed while all its workers live: try again a few times, then fail its requests."""
        yield from self._retrying.failed(gang, error, now)

    def retired(self, sequence: int, worker: str, now: float) -> Iterator[Command]:
        """A worker computes on a sequence no more."""
        live = self.live.get(sequence)
        if live is not None and live.retires[worker] > 1 and worker in self.ledger.workers:
            live.retires[worker] -= 1  # it was asked again meanwhile, and answers that too
            return
        if live is not None:
            live.retires.pop(worker, None)
        if live is None or live.state != "retiring":
            yield from self.moving.paused(sequence, worker, now)
        else:
            yield from self._retiring.retired(live, worker, now)

    # Admission and prefill

    def _admit(self, now: float) -> Iterator[Command]:
        while self._queue and not self._closing and self.prefilling.has_room:
            admitted = self._queue.admit()
            if admitted is None:
                evicted = self.documents.evict(now)
                if evicted is None:
                    evicted = self._preemption.make_way(now)
                if evicted is None:
                    return
                yield from evicted
                continue
            ask, placement = admitted
            live = self.live[ask.sequence]
            ask = self._reuse.share(live, ask, placement, now)
            live.state, live.admitted = "prefill", live.admitted or now
            yield from self.cache.reserve(live.sequence)
            if live.saved is not None:
                yield from self._saving.begin(live, now)
                continue
            yield self.prefilling.begin(live, ask.shared)

    def _too_large(self, live: Live) -> DistKVError:
        return too_large(live, self.ledger, self.policy, self.block_bytes)
