"""Work of a stream: kernels and copies, which are executed at once, and recorded if the stream is being captured."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from emulated.capture import permit_stop
from emulated.clocks import HOST, Queue
from emulated.counts import Kind, note
from emulated.faults import FAULTS
from emulated.memory import DeviceMemory, known_memory, memory_of
from emulated.shadow import Region
from emulated.streams import current_stream


class Work:
    """Work for the card, executed once or, in a graph, repeatedly.

    It holds host tensors with the bytes of device tensors, but not the device tensors: their memory may be freed.
    """

    kind: Kind = "launch"
    variant: object = None
    nbytes = 0

    def __init__(self, name: str) -> None:
        self.name = name
        self.numbers: list[Tensor] = []
        """Scalars in host memory among its arguments."""
        self.fresh: list[DeviceMemory] = []
        """Memory of its results, until tensors hold it."""

    def given(self) -> Iterable[Tensor]:
        """Host tensors with the bytes of the device tensors that it uses."""
        raise NotImplementedError

    def written(self) -> Iterable[Tensor]:
        """Those of the given tensors that it changes."""
        return []

    def memories(self) -> list[DeviceMemory]:
        """The card's memory that contains the given tensors."""
        found = (known_memory(held) for held in self.given())
        return [memory for memory in found if memory is not None]

    def do(self, stream: Queue, tick: int) -> Any:
        """Execute it as an operation of a stream; returns its results.

        Raises
        ------
        RaceError
            It uses bytes that another stream uses, too, and nothing orders the uses.
        """
        raise NotImplementedError

    def repeat(self, stream: Queue, tick: int) -> None:
        """Execute it again; results are written to the same memory as before."""
        self.do(stream, tick)


class Kernel(Work):
    """An operation of torch.

    Parameters
    ----------
    name
        Name of the operation.
    run
        Executes it on the host tensors.
    given
        The host tensors.
    written
        Those of them that it changes.
    regions
        Returns the regions that it uses, by ``id``, of tensors that it does not use entirely; called each time, because
        indices change.
    """

    def __init__(
        self, name: str, run: Callable[[], Any], given: list[Tensor], written: list[Tensor] | None = None,
        regions: Callable[[], dict[int, Region]] = dict,
    ) -> None:  # fmt: skip
        super().__init__(name)
        self._run, self._given, self._written, self._regions = run, given, written or [], regions
        self._made: Any = None

    def given(self) -> Iterable[Tensor]:
        return self._given

    def written(self) -> Iterable[Tensor]:
        return self._written

    def do(self, stream: Queue, tick: int) -> Any:
        self._use(stream, tick)
        with torch.inference_mode(False):
            self._made = self._run()
        self.fresh = [memory_of(one) for one in self._results()]
        for one in self._results():
            use(one, True, stream, tick)
        return self._made

    def repeat(self, stream: Queue, tick: int) -> None:
        self._use(stream, tick)
        with torch.inference_mode(False):
            again = self._run()
            for old, new in zip(tensors(self._made), tensors(again), strict=True):
                if new is not old:
                    old.copy_(new)
        for one in self._results():
            use(one, True, stream, tick)

    def _use(self, stream: Queue, tick: int) -> None:
        regions = self._regions()
        for one in self._given:
            use(one, any(one is other for other in self._written), stream, tick, regions.get(id(one)))

    def _results(self) -> list[Tensor]:
        return [one for one in tensors(self._made) if not any(one is other for other in self._given)]


def perform(work: Work) -> Any:
    """Queue work on the current stream; returns its results."""
    FAULTS.queued()
    note(work.kind, work.name, work.nbytes, work.variant)
    stream = current_stream().queue
    tick = stream.begin(work.name)
    if stream.capture is None:
        return work.do(stream, tick)
    return stream.capture.take(work, stream, tick)


def stop(name: str, stream: Queue | None = None) -> None:
    """Make the host wait for a stream, by default the current one."""
    FAULTS.call()
    stream = stream or current_stream()
    permit_stop(name, stream)
    note("sync", name)
    HOST.waits(stream.clock)


def use(held: Tensor, write: bool, stream: Queue, tick: int, where: Region | None = None) -> None:
    """Record that a stream uses the bytes of a device tensor; no effect if the memory belongs to a graph by now."""
    memory = known_memory(held)
    if memory is not None:
        memory.use(where or Region.of(held), write, stream, tick)


def tensors(values: Any) -> Iterator[Tensor]:
    """Tensors in a value, in lists, or in lists of lists."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, list | tuple):
        for value in values:
            yield from tensors(value)
