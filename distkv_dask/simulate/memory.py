"""Pools and disks of simulated workers: which blocks are there, and the tokens whose KV they hold.

It checks the state machine's messages: KV has to be where the home looks for it, nothing may be written into blocks of
other sequences, and no pool may exceed its capacity.
"""

from __future__ import annotations

from collections.abc import Sequence

from distkv_dask.gang import SequenceState
from distkv_dask.messages import to_worker as to
from distkv_dask.messages.names import HOST_MEMORY, OWN_DISK, SavedFile, SpilledFile, Transfer, sequence_in_pool
from distkv_dask.placement import Placement
from distkv_dask.scheduler.commands import Command
from distkv_dask.scheduler.records.machine_state import MachineState

Table = dict[int, tuple[int, ...]]
"""Logical block of a sequence -> the tokens whose KV it holds."""


class Memory:
    """Memory of all workers of one engine.

    Parameters
    ----------
    life
        The engine's state machine, which knows the tokens.

    Attributes
    ----------
    pools
        By worker and sequence.
    disks, hosts
        Spilled blocks by worker and file, on disk and in host memory.
    folder
        Saved blocks by file, which all workers reach.
    expected
        Moves and copies whose target has allocated its blocks.
    """

    def __init__(self, life: MachineState) -> None:
        self.life = life
        self.pools: dict[str, dict[int, Table]] = {}
        self.disks: dict[str, dict[str, Table]] = {}
        self.hosts: dict[str, dict[str, Table]] = {}
        self.folder: dict[str, Table] = {}
        self.expected: set[Transfer] = set()
        self._again: set[tuple[str, int, int]] = set()

    def add(self, worker: str) -> None:
        """A worker joins, with nothing on it."""
        self.pools[worker], self.disks[worker], self.hosts[worker] = {}, {}, {}

    def remove(self, worker: str) -> None:
        """A worker is gone, with its host memory and disk."""
        del self.pools[worker], self.disks[worker], self.hosts[worker]
        self._again = {one for one in self._again if one[0] != worker}

    def used(self, worker: str) -> int:
        """Blocks of a worker that belong to sequences; shared blocks count once."""
        return sum(map(len, self.pools[worker].values())) - sum(one[0] == worker for one in self._again)

    def blocks(self, start: int, stop: int) -> range:
        """Logical blocks of tokens ``[start, stop)``."""
        size = self.life.config.block_tokens
        return range(start // size, -(-stop // size) if stop > start else 0)

    # Messages

    def enact(self, command: Command) -> None:
        """Allocate, free, and delete."""
        match command:
            case to.Reserve(worker, sequence, start, stop):
                self._reserve(worker, sequence, start, stop)
            case to.Expect(worker, transfer, sequence, start, stop):
                # at once: messages to one worker arrive in order, so before a Free or Release of these blocks
                self._reserve(worker, sequence, start, stop)
                self.expected.add(transfer)
            case to.Share(worker, source, sequence, start, stop):
                self._share(worker, source, sequence, start, stop)
            case to.Release(worker, sequence):
                table = self.pools[worker].pop(sequence, {})  # a move that has only begun left nothing there
                self._again -= {(worker, sequence, block) for block in table}
            case to.Free(worker, sequence, start, stop) if worker in self.pools:
                for block in self.blocks(start, stop):
                    self.pools[worker].get(sequence, {}).pop(block, None)
                    self._again.discard((worker, sequence, block))
                if not self.pools[worker].get(sequence, True):
                    del self.pools[worker][sequence]
            case to.Discard(worker, names):
                for name in names:
                    self.disks.get(worker, {}).pop(name, None)
                    self.hosts.get(worker, {}).pop(name, None)
            case to.Demote(worker, files):
                for file in files:
                    if (content := self.hosts[worker].pop(file.name, None)) is not None:
                        self.disks[worker][file.name] = content

    def copy(self, message: to.Send) -> str:
        """Copy the blocks of a move to its target; returns the reason if that failed."""
        source = self.pools.get(message.worker, {}).get(message.sequence, {})
        copied = message.transfer.number if message.transfer.kind == "copy" else message.sequence
        target = self.pools.get(message.target, {}).get(copied, {})
        wanted = set(self.blocks(message.start, message.stop))
        if not wanted <= source.keys() & target.keys():
            return "not expected any more"
        target.update({block: source[block] for block in wanted})
        return ""

    def write(self, message: to.Store) -> tuple[SavedFile, ...]:
        """Write blocks to the worker's host memory or disk, or to the folder."""
        table, files = self.pools[message.worker].get(message.sequence, {}), files_of(message)
        own = {OWN_DISK: self.disks, HOST_MEMORY: self.hosts}.get(message.saved.place)
        place = self.folder if own is None else own[message.worker]
        for file in files:
            # a sequence that was dropped in the meantime is still written, without any use
            wanted = self.blocks(file.start, file.stop)
            place[file.name] = {block: table[block] for block in wanted if block in table}
        return files

    def read(self, message: to.Fetch) -> Exception | None:
        """Fill blocks from files; returns the reason if that failed."""
        table, failure = self.pools[message.worker].get(message.sequence, {}), None
        for block in (block for start, stop in message.ranges for block in self.blocks(start, stop)):
            files = (file for file in message.saved.files if block in self.blocks(file.start, file.stop))
            content = self._content(next(files, None))
            if content is None or block not in content:
                failure = OSError("not on any disk")
                continue
            assert block in table, "read into another sequence's blocks"
            table[block] = content[block]
        return failure

    def _content(self, file: SavedFile | SpilledFile | None) -> Table | None:
        if file is None:
            return None
        if not isinstance(file, SpilledFile):
            return self.folder.get(file.name)
        if (owner := sequence_in_pool(file.name)) is not None:
            return self.pools.get(file.worker, {}).get(owner)
        return (self.hosts.get(file.worker, {}) | self.disks.get(file.worker, {})).get(file.name)

    def _reserve(self, worker: str, sequence: int, start: int, stop: int) -> None:
        table = self.pools[worker].setdefault(sequence, {})
        for block in self.blocks(start, stop):
            table.setdefault(block, ())  # a repaired sequence keeps what it has
        assert self.used(worker) <= self.life.ledger.workers[worker].capacity

    def _share(self, worker: str, source: int, sequence: int, start: int, stop: int) -> None:
        """Share full blocks of a sequence with another one; the first may still look for them in its own table."""
        table = self.pools[worker][source]
        for block in self.blocks(start, stop):
            assert len(table[block]) == self.life.config.block_tokens, "shared before it was computed"
            self.pools[worker].setdefault(sequence, {})[block] = table[block]
            self._again.add((worker, source, block))

    # Work

    def compute(self, sequence: int, placement: Placement, start: int, stop: int, more: Sequence[int] = ()) -> None:
        """Compute the KV of tokens ``[start, stop)``: all earlier KV has to be where the placement says.

        ``more`` are the tokens generated since the last commit.
        """
        request, size = self.life.requests[sequence], self.life.config.block_tokens
        text = [*request.prompt, *request.generated, *more]
        for span in placement:
            owner = sequence if span.document is None else span.document
            for block in self.blocks(span.start, min(span.stop, start)):
                there = self.pools[span.worker][owner][block]
                wanted = text[block * size : min(start, (block + 1) * size)]
                assert [*there[: len(wanted)]] == wanted, "KV is not where the home looks for it"
            for block in self.blocks(max(span.start, start), min(span.stop, stop)):
                assert owner == sequence, "written into a document's blocks"
                table = self.pools[span.worker][sequence]
                assert block in table, "computed into blocks that are not its own"
                table[block] = tuple(text[block * size : min(stop, (block + 1) * size)])

    def check_join(self, state: SequenceState) -> None:
        """Check that a home decodes from the known tokens."""
        request = self.life.requests[state.sequence]
        assert state.length == len(request.prompt) + len(request.generated) - 1


def files_of(message: to.Store) -> tuple[SavedFile, ...]:
    """The files in which a worker writes blocks."""
    return tuple(SavedFile(f"{message.saved.tag}-{start}", start, stop, 0, 0) for start, stop in message.ranges)
