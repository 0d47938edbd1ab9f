"""What simulated workers do with each message: batches, windows and chunks by home, and their answers.

Callers decide when: :mod:`~distkv_dask.simulate.cluster` follows the performance model, tests use any order.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from distkv_dask.errors import DistKVError
from distkv_dask.gang import DecodeWindow, Exchanged, Gang, PrefillChunk, SequenceState, WindowResult
from distkv_dask.messages import from_worker as did
from distkv_dask.messages import to_worker as to
from distkv_dask.placement import Endpoint, Placement, Span
from distkv_dask.sampling import FinishReason
from distkv_dask.scheduler import commands as do
from distkv_dask.simulate.memory import Memory, files_of

ANSWERS = 1000
"""The first token of a sequence's answer is this times its number; each further one is one more."""
SEQUENCES = 2_000_000
"""Sequences whose answers differ; their tokens fit 32 bits."""

Asked = to.Retire | to.Expect | to.Send | to.Relocate | to.Store | to.Fetch
"""Messages that a worker answers."""


@dataclass(slots=True)
class Decoding:
    """A sequence in the batch of a home.

    ``length`` tokens have KV, ``last`` is the last drawn token, ``remaining`` may follow. ``remote`` counts its own
    tokens that have room on other workers; ``shared`` are spans of documents.
    """

    length: int
    last: int
    remaining: int
    placement: Placement = ()
    remote: dict[str, int] = field(default_factory=dict)
    shared: list[Span] = field(default_factory=list)

    def lies(self, placement: Placement) -> None:
        """Take a new placement."""
        home = placement[-1].worker
        self.placement, self.remote, self.shared = placement, {}, []
        for span in placement:
            if span.document is not None:
                self.shared.append(span)
            elif span.worker != home:
                self.remote[span.worker] = self.remote.get(span.worker, 0) + span.tokens


class Workers:
    """Workers of one engine, as its state machine sees them.

    Parameters
    ----------
    memory
        Pools and disks with their contents, which check the messages; None checks nothing.

    Attributes
    ----------
    batches, epochs, windows
        By home: sequences that it decodes, its epoch, and windows that were submitted and are not done.
    chunks
        For each prompt the chunks that are not computed, in order.
    attending
        Gangs and the holders that were asked to attend them.
    """

    def __init__(self, memory: Memory | None = None) -> None:
        self.memory = memory
        self.batches: dict[str, dict[int, Decoding]] = {}
        self.epochs: dict[str, int] = {}
        self.windows: dict[str, list[DecodeWindow]] = defaultdict(list)
        self.chunks: list[list[PrefillChunk]] = []
        self.attending: set[tuple[int, str]] = set()

    def add(self, worker: str) -> None:
        """A worker joins, with nothing on it."""
        self.batches[worker], self.epochs[worker] = {}, 0
        if self.memory is not None:
            self.memory.add(worker)

    def remove(self, worker: str) -> None:
        """A worker is gone, with everything that it had."""
        del self.batches[worker]
        self.windows.pop(worker, None)
        self.chunks = [chain for chain in self.chunks if all(chunk.gang.home != worker for chunk in chain)]
        if self.memory is not None:
            self.memory.remove(worker)

    # Messages

    def enact(self, command: do.Command) -> None:
        """Carry out commands of the state machine that take no time."""
        if self.memory is not None:
            self.memory.enact(command)
        match command:
            case do.SubmitWindow(window, after):
                queued = self.windows[window.gang.home]
                assert (after is None) == (not queued)
                queued.append(window)
                self._attend(window.gang, window.gang.holders)
            case do.SubmitPrefill(chunks):
                self.chunks.append(list(chunks))
                for chunk in chunks:
                    self._attend(chunk.gang, chunk.gang.holders)
            case do.AddHolders(gang, holders):
                self._attend(gang, holders)
            case do.ForgetTasks(gang, finished):
                self.attending.difference_update((gang.number, holder.worker) for holder in gang.holders)
                if not finished:
                    self._drop_tasks(gang)
            case to.Join(home, state, _):
                self._join(home, state)
            case to.Relocate(home, _, sequence, placement) if sequence in self.batches[home]:
                self.batches[home][sequence].lies(placement)
            case to.Retire(worker, sequence):
                self.batches[worker].pop(sequence, None)
            case to.Reset(home, epoch):
                self.batches[home].clear()
                self.epochs[home] = epoch
            case to.Abort(worker, gang):
                assert worker in self.batches
                self.attending.discard((gang, worker))

    def answer(self, message: Asked) -> did.FromWorker | None:
        """Carry out a message that takes time, and return the answer; None from a worker that is gone."""
        memory = self.memory
        if message.worker not in self.batches:
            return None
        match message:
            case to.Retire(worker, sequence):
                return did.Retired(worker, sequence)
            case to.Expect(worker, transfer):
                has_room = memory is None or transfer in memory.expected
                return did.Expected(worker, transfer, "" if has_room else "no room")
            case to.Send(worker, transfer):
                return did.Sent(worker, transfer, "" if memory is None else memory.copy(message))
            case to.Relocate(worker, number):
                return did.Relocated(worker, number)
            case to.Store(worker, transfer):
                return did.Stored(worker, transfer, files_of(message) if memory is None else memory.write(message))
            case to.Fetch(worker, sequence):
                return did.Fetched(worker, sequence, None if memory is None else memory.read(message))

    def _attend(self, gang: Gang, holders: Iterable[Endpoint]) -> None:
        for holder in holders:
            assert holder.worker in self.batches
            assert holder.worker != gang.home
            self.attending.add((gang.number, holder.worker))

    def _join(self, home: str, state: SequenceState) -> None:
        if self.memory is not None:
            self.memory.check_join(state)
        entry = self.batches[home][state.sequence] = Decoding(state.length, state.last_token, state.remaining)
        entry.lies(state.placement)

    def _drop_tasks(self, gang: Gang) -> None:
        for chain in self.chunks:
            chain[:] = [chunk for chunk in chain if chunk.gang.number != gang.number]
        self.chunks = [chain for chain in self.chunks if chain]
        if gang.home in self.windows:
            self.windows[gang.home] = [one for one in self.windows[gang.home] if one.gang.number != gang.number]

    # Work

    def head(self, sequence: int) -> PrefillChunk | None:
        """The first chunk of a prompt that is computed now, or next."""
        return next((chain[0] for chain in self.chunks if chain[0].sequence == sequence), None)

    def is_next(self, chunk: PrefillChunk) -> bool:
        """Whether a chunk is computed now or next; others of its prompt may be, too."""
        return any(chain[0] is chunk for chain in self.chunks)

    def waits(self, chunk: PrefillChunk) -> bool:
        """Whether chunks that one follows are still under way."""
        under_way = {one.gang.number for chain in self.chunks for one in chain}
        return any(earlier.gang in under_way for earlier in chunk.gang.follows)

    def compute(self, chunk: PrefillChunk) -> did.ChunkDone | did.Prefilled:
        """Compute the next chunk of a prompt; its last one draws the first token."""
        sequence, gang = chunk.sequence, chunk.gang
        if self.memory is not None:
            stop = chunk.stop
            self._check_attended(gang, (span for span in chunk.placement if span.start < stop))
            self.memory.compute(sequence, chunk.placement, chunk.start, stop)
        self.chunks = [chain[1:] if chain[0] is chunk else chain for chain in self.chunks if chain != [chunk]]
        if chunk.sampling is None:
            return did.ChunkDone(gang.home, sequence, gang.number, Exchanged())
        reason: FinishReason | None = "length" if chunk.sampling.max_new_tokens == 1 else None
        return did.Prefilled(gang.home, sequence, gang.number, first_token(sequence), reason, Exchanged())

    def decode(
        self,
        window: DecodeWindow,
        parts: Mapping[int, tuple[int, Placement]],
        steps: int,
        seconds: float,
        used: tuple[str, ...] = (),
    ) -> did.WindowDone:
        """Decode a window.

        Parameters
        ----------
        parts
            Maximum tokens of each sequence, and its placement when the window began.
        steps, seconds, used
            The home's report of the window: steps, their time, and the holders that it needed.
        """
        home = window.gang.home
        batch = self.batches[home]
        tokens: dict[int, list[int]] = {}
        finished: dict[int, FinishReason] = {}
        errors: dict[int, DistKVError] = {}
        for sequence, (count, placement) in parts.items():
            if sequence not in batch:
                continue  # it was retired in the meantime
            entry = batch[sequence]
            drawn, reason, error = self.draw(sequence, entry, min(count, entry.remaining))
            tokens[sequence] = drawn
            if self.memory is not None:
                self._check_attended(window.gang, placement)
                self.memory.compute(sequence, placement, entry.length, entry.length + len(drawn), drawn)
            entry.length += len(drawn)
            entry.remaining -= len(drawn)
            entry.last = drawn[-1] if drawn else entry.last
            if reason is not None or not entry.remaining:
                finished[sequence] = reason or "length"
                del batch[sequence]
            if error is not None:
                errors[sequence] = error
        self.windows[home].remove(window)
        result = WindowResult(tokens, finished, steps, seconds, errors=errors)
        return did.WindowDone(home, window.window, self.epochs[home], result, used)

    def draw(
        self, sequence: int, entry: Decoding, count: int
    ) -> tuple[list[int], FinishReason | None, DistKVError | None]:
        """The next tokens of a sequence, and why it ends with them."""
        return list(range(entry.last + 1, entry.last + 1 + count)), None, None

    def _check_attended(self, gang: Gang, spans: Iterable[Span]) -> None:
        for span in spans:
            attended = span.worker == gang.home or not span.tokens or (gang.number, span.worker) in self.attending
            assert attended, "a holder was not asked to attend"


def first_token(sequence: int) -> int:
    """The first token of a sequence's answer."""
    return sequence % SEQUENCES * ANSWERS
