"""What is queued on the current stream: every kernel, copy and stop goes through here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from emulated.counts import note
from emulated.shadow import Region
from emulated.streams import HOST, Stream, current_stream
from emulated.tensor import CudaTensor

_NOWHERE: Mapping[int, Region] = {}


def launch(
    name: str, reads: Iterable[CudaTensor], writes: Iterable[CudaTensor], regions: Mapping[int, Region] = _NOWHERE
) -> None:
    """Queue a kernel; regions say, by ``id`` of a tensor, what it uses of that, where it is not all."""
    note("launch", name)
    stream = current_stream()
    tick = stream.begin(name)
    for tensors, write in ((reads, False), (writes, True)):
        for one in tensors:
            region = regions.get(id(one)) or Region.of(one.bytes)
            one.memory.use(region, write, stream, tick)


def stop(name: str, stream: Stream | None = None) -> None:
    """Have the host wait for a stream, by default the current one."""
    note("sync", name)
    HOST.waits((stream or current_stream()).clock)
