"""A session's turns in C++ (worker/native/holder.cpp): expected requests are answered without Python."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch

from distkv_dask.kernels import native_kernel
from distkv_dask.worker.asked_layers import next_layers
from distkv_dask.worker.channels.frames import HEADER_BYTES, Header
from distkv_dask.worker.channels.stream_inlet import StreamInlet
from distkv_dask.worker.native.structs import HeaderBytes, Session
from distkv_dask.worker.native.wire import wire
from distkv_dask.worker.shard import Shard
from distkv_dask.worker.trace import Ring

_PYTHON, _UNSENT, _BAD_BATCH = 2, 3, 4  # distkv::Turn in native/holder.cpp


class NativeTurns:
    """A session's batch for :func:`serve`. Between its calls, Python owns the frames and the turn.

    Parameters
    ----------
    inlet
        The home's channel; requests are in its buffer.
    shard
        The batch.
    tensors
        q, k and v of every request, views of the inlet's buffer.
    reply
        Header of every answer, except for layer and step.
    ring
        Records answers, if given.
    """

    def __init__(
        self,
        inlet: StreamInlet,
        shard: Shard,
        tensors: Sequence[torch.Tensor],
        reply: Header,
        ring: Ring | None = None,
    ) -> None:
        self._ring = ring
        self._inlet = inlet
        after = torch.tensor(next_layers(shard.asked, shard.layers))
        self._kept = shard, tensors, after
        self._reply = shard.result.view(torch.uint8).numpy().data
        self._session = Session(
            fd=inlet.fileno(),
            frame=inlet.data.data_ptr(),
            batch=ctypes.addressof(shard.native) if shard.native is not None else None,
            answer=shard.result.data_ptr(),
            answer_bytes=shard.result.nbytes,
            next=after.data_ptr(),
            reply=HeaderBytes.from_buffer_copy(reply.pack()),
        )
        for name, tensor in zip("qkv", tensors, strict=True):
            setattr(self._session, name, tensor.data_ptr())
        if ring is not None:
            self._session.marks, self._session.peer = ring.native.address, ring.native.number(inlet.peer)
        self.address = ctypes.addressof(self._session)

    def hand_to_native(self, turn: Header) -> None:
        """Let :func:`serve` continue from a turn."""
        session = self._session
        session.filled, session.frame_bytes = self._inlet.filled, HEADER_BYTES + turn.length
        session.layer, session.status = turn.layer, 0
        session.expected = HeaderBytes.from_buffer_copy(turn.pack())
        if self._ring is not None:
            self._ring.native.start_behind(self._ring.last)

    def take_from_native(self) -> tuple[int, float, int, bool]:
        """Continue in Python; returns answered requests, their seconds, the next layer, and if frames are pending."""
        session = self._session
        if self._ring is not None:
            self._ring.collect()
        unsent: tuple[bytes | memoryview, ...] = ()
        if session.status == _UNSENT:
            unsent = bytes(session.reply), self._reply
        self._inlet.go_on(session.filled, session.sent, *unsent)
        taken = session.answered, session.busy, session.layer, session.status in (_PYTHON, _BAD_BATCH)
        session.answered, session.busy = 0, 0.0
        return taken


def new_turns(
    inlet: object,
    shard: Shard,
    tensors: Sequence[torch.Tensor],
    reply: Header,
    ring: Ring | None = None,
) -> NativeTurns | None:
    """Turns in C++, if the channel is a plain socket and the library is available."""
    if type(inlet) is not StreamInlet or shard.native is None or wire() is None:
        return None
    return NativeTurns(inlet, shard, tensors, reply, ring)


def serve(poller: int, turns: Sequence[NativeTurns], seconds: float) -> None:
    """Answer requests until Python has something to do, at most for this many seconds.

    Parameters
    ----------
    poller
        The epoll descriptor of a selector on which everything that Python waits for is registered.
    turns
        Sessions that may be answered here.
    """
    library = wire()
    assert library is not None
    sessions = (ctypes.c_void_p * len(turns))(*(one.address for one in turns))
    library.distkv_serve(poller, sessions, len(turns), native_kernel.address("distkv_layer"), seconds)
