"""A holder's part in one gang: from BEGIN to END it answers one home's MicroAttention requests."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from distkv_dask.errors import ChannelError, ChannelTimeoutError
from distkv_dask.gang import Gang
from distkv_dask.worker.asked_layers import next_layers
from distkv_dask.worker.blocks.pool import Pool
from distkv_dask.worker.channels.base import Inlet
from distkv_dask.worker.channels.bodies import Row
from distkv_dask.worker.channels.frames import HEADER_BYTES, Header, Kind
from distkv_dask.worker.device import Use
from distkv_dask.worker.holder.desk import Desk
from distkv_dask.worker.holder.native_turns import NativeTurns, new_turns
from distkv_dask.worker.shard import Shard
from distkv_dask.worker.trace import Ring
from distkv_dask.worker.under_way import UnderWay


@dataclass(frozen=True, slots=True)
class SessionStats:
    """What a session did: requests answered, payload bytes received and sent, seconds spent on answers."""

    requests: int
    bytes_in: int
    bytes_out: int
    busy_seconds: float


class Session:
    """Holder's side of a gang. Only :meth:`wait` is for other threads than the holder lane's.

    Parameters
    ----------
    gang
        The gang; requests of any other, or of another epoch, are refused.
    pool
        Where the KV is.
    """

    def __init__(self, gang: Gang, pool: Pool) -> None:
        self.gang = gang
        self.result: Future[SessionStats] = Future()
        self.sequences: frozenset[int] = frozenset()
        """Sequences of the batch under way."""
        self.under_way = UnderWay()
        """Chunks that are computed here, some of which it may follow."""
        self._follows = [earlier.gang for earlier in gang.follows]
        self._native: NativeTurns | None = None
        self._ring: Ring | None = None
        self._pool = pool
        self._turn = (Kind.ATTEND, gang.number, gang.epoch, 0, 0, 0)
        self._first = 0
        self._requests = self._bytes_in = self._bytes_out = 0
        self._busy = 0.0

    def wait(self, timeout: float | None = None) -> SessionStats:
        """Wait until the session has ended.

        Parameters
        ----------
        timeout
            Seconds; None waits as long as the session's own time limits allow.

        Raises
        ------
        GangAbortedError
            The home failed, or the gang was aborted.
        ChannelTimeoutError
            The home was silent for too long, or ``timeout`` passed.
        ChannelError
            The home closed its channel, or sent what was not expected.
        """
        try:
            return self.result.result(timeout)
        except ChannelError:
            raise
        except TimeoutError as error:
            raise ChannelTimeoutError(f"the session of gang {self.gang.name} did not end in {timeout} s") from error

    def set_batch(self, inlet: Inlet, heads: int, step: int, rows: list[Row]) -> None:
        """Use these rows from ``step`` on, and make the tensors for all their requests.

        Raises
        ------
        PlanError
            A row has no room here.
        ChannelError
            The batch came in the middle of a step.
        """
        kind, number, epoch, layer, _, _ = self._turn
        if layer != self._first:
            raise ChannelError(f"a batch came where {Header(*self._turn)} was expected")
        pool = self._pool
        with self._queuing():
            self._shard = shard = Shard(pool, rows, heads)
        self.sequences = frozenset(row.sequence for row in rows)
        q_shape = (shard.tokens, heads, pool.head_dim)
        kv_shape = (pool.planes, shard.appended, pool.kv_heads, pool.head_dim)
        size = pool.dtype.itemsize
        q_bytes, kv_bytes = torch.Size(q_shape).numel() * size, torch.Size(kv_shape).numel() * size
        self._after = next_layers(shard.asked, shard.layers)
        self._first = self._after[-1]
        self._turn = (kind, number, epoch, self._first, step, q_bytes + kv_bytes)
        inlet.maximum = max(inlet.maximum, q_bytes + kv_bytes)
        inlet.make_room(inlet.maximum)
        with self._queuing():
            self._desk = desk = Desk(pool.device, inlet.data[HEADER_BYTES:][: q_bytes + kv_bytes], shard.result)
        data = desk.question.view(pool.dtype)
        self._q = data[: torch.Size(q_shape).numel()].view(q_shape)
        kv = data[torch.Size(q_shape).numel() :].view(kv_shape)
        self._keys, self._values = kv[0], kv[-1][..., : pool.value_dim]
        self._reply = desk.reply.view(torch.uint8).numpy().data
        reply = Header(Kind.PARTIAL, number, epoch, length=len(self._reply))
        self._native = new_turns(inlet, shard, (self._q, self._keys, self._values), reply, self._ring)

    def is_stored(self, header: Header) -> bool:
        """Whether all KV that an ATTEND frame needs is stored here: chunks that this one follows may be under way.

        Raises
        ------
        GangAbortedError
            Some of it never will be.
        """
        self._follows = [gang for gang in self._follows if not self.under_way.is_computed(gang)]
        return all(self.under_way.is_stored(gang, header.layer) for gang in self._follows)

    def hand_to_native(self) -> NativeTurns | None:
        """Let requests be answered in C++ until :meth:`take_from_native`; None if they cannot."""
        if self._native is None or self._shard.full or self._follows:
            return None
        self._native.hand_to_native(Header(*self._turn))
        return self._native

    def take_from_native(self) -> tuple[int, bool]:
        """Continue in Python; returns the number of requests that C++ answered, and whether frames are pending."""
        assert self._native is not None
        answered, busy, layer, waits = self._native.take_from_native()
        if answered:
            self._count(answered, busy)
            self._next(layer)
        return answered, waits

    def answer(self, inlet: Inlet, header: Header) -> None:
        """Append, attend and reply to the ATTEND frame in ``inlet``.

        Raises
        ------
        ChannelError
            It is not the layer, step or length whose turn it is; the message has both sides' view.
        """
        began = time.perf_counter()
        if header[:6] != self._turn:
            raise ChannelError(f"the home sent {header}; this holder expected {Header(*self._turn)}")
        self._attend(header)
        self._reply_to(inlet, header)
        self._next(self._after[header.layer])
        self._count(1, time.perf_counter() - began)

    @contextmanager
    def _queuing(self) -> Iterator[None]:
        """Queue on the holder's stream; after an error, wait until nothing there can write to others' blocks."""
        device = self._pool.device
        with device.stream(Use.HOLDER):
            try:
                yield
            except BaseException:
                device.finish()
                raise

    def _attend(self, header: Header) -> None:
        with self._queuing():
            self._desk.fetch()
            self._shard.attend(header.layer, self._q, self._keys, self._values, header.scale)
            self._desk.leave()

    def _reply_to(self, inlet: Inlet, header: Header) -> None:
        _, number, epoch, layer, step, _, _ = header
        reply = self._reply
        inlet.send(Header(Kind.PARTIAL, number, epoch, layer, step, len(reply)), reply)

    def end(self) -> None:
        """Complete the session."""
        self.result.set_result(SessionStats(self._requests, self._bytes_in, self._bytes_out, self._busy))

    def fail(self, error: Exception) -> None:
        """End the session with an error."""
        if not self.result.done():
            self.result.set_exception(error)

    def _next(self, layer: int) -> None:
        """Set the expected layer to ``layer``, and advance the step if that is the first queried layer."""
        kind, number, epoch, _, step, length = self._turn
        if layer == self._first:
            with self._queuing():
                self._shard.advance()
            step += 1
        self._turn = (kind, number, epoch, layer, step, length)

    def _count(self, requests: int, seconds: float) -> None:
        *_, length = self._turn
        self._requests += requests
        self._bytes_in += requests * length
        self._bytes_out += requests * len(self._reply)
        self._busy += seconds
