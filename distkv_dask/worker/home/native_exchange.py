"""A step's exchange in C++ (worker/native/home.cpp): two calls per layer, whatever the number of holders."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable
from typing import Any

import torch

from distkv_dask.errors import ChannelError
from distkv_dask.gang import Exchanged
from distkv_dask.kernels import native_kernel
from distkv_dask.worker.asked_layers import asked_layers
from distkv_dask.worker.channels.frames import HEADER_BYTES, Header, Kind
from distkv_dask.worker.channels.stream import StreamChannel
from distkv_dask.worker.channels.tcp import TcpChannel
from distkv_dask.worker.channels.unix import UnixChannel
from distkv_dask.worker.home.exchange import Asking, Exchange, bytes_of, indices, late
from distkv_dask.worker.home.python_exchange import PythonExchange
from distkv_dask.worker.native.structs import HeaderBytes, Holder, Home
from distkv_dask.worker.native.wire import wire
from distkv_dask.worker.plan import Part
from distkv_dask.worker.trace import Ring

_LATE = 2  # distkv::Status in native/home.cpp
_LOCAL = -1  # distkv::Run's holder, for the home's own partials


class NativeExchange:
    """Over plain sockets; see :class:`distkv_dask.worker.home.exchange.Exchange`."""

    def __init__(self, asking: Asking, library: ctypes.CDLL, ring: Ring | None = None) -> None:
        self._asking = asking
        self._ring = ring
        self._ask, self._gather = library.distkv_ask, library.distkv_gather
        self._channels: list[StreamChannel] = []
        self._answers: list[memoryview] = []
        self._kept: list[Any] = []
        holders = (Holder * len(asking.holders))()
        for holder, (_, channel, part) in zip(holders, asking.holders, strict=True):
            assert isinstance(channel, StreamChannel)
            self._channels.append(channel)
            self._fill(holder, channel, part)
        out, lse, local = asking.out, asking.lse, asking.local
        number = {worker: at for at, (worker, _, _) in enumerate(asking.holders)} | {asking.gang.home: _LOCAL}
        runs = torch.tensor([(number[worker], *run) for worker, *run in asking.order], dtype=torch.int64)
        self._kept += [local, runs]
        self._holders = holders
        self._home = Home(
            ctypes.addressof(holders), len(holders), native_kernel.address("distkv_merge"), out.data_ptr(),
            lse.data_ptr(), *out.shape, *((0, 0) if local is None else (part.data_ptr() for part in local)),
            runs.data_ptr(), len(runs),
        )  # fmt: skip
        if ring is not None:
            self._home.marks = ring.native.address
        self._at = ctypes.addressof(self._home)

    @property
    def exchanged(self) -> Exchanged:
        """What was exchanged so far."""
        home = self._home
        return Exchanged(home.sent, home.waited, home.bytes_out, home.bytes_in)

    def ask(self, layer: int, step: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> None:
        """Send the queries, and the KV of tokens that belong to tails elsewhere."""
        values = v.data_ptr() if self._asking.pool.planes == 2 else None
        if self._ask(self._at, q.data_ptr(), k.data_ptr(), values, layer, step, scale):
            home = self._home
            self._collect()
            expected, _ = self._expected(home.culprit, layer, step)
            asked = expected._replace(kind=Kind.ATTEND, length=self._length(home.culprit))
            error = OSError(home.error, os.strerror(home.error))
            raise self._channels[home.culprit].not_sent(asked, error) from error

    def gather(self, layer: int, step: int) -> None:
        """Wait for the partials of all holders, and merge each as soon as all earlier ones in order have arrived."""
        status = self._gather(self._at, self._asking.limit)
        self._collect()
        if status:
            self._fail(status, layer, step)

    def close(self) -> None:
        """Forget the channels."""

    def _collect(self) -> None:
        if self._ring is not None:
            self._ring.collect()

    def _fill(self, holder: Holder, channel: StreamChannel, part: Part) -> None:
        """Describe a holder's part."""
        pool, gang = self._asking.pool, self._asking.gang
        tokens, heads, dv = self._asking.out.shape
        d = pool.head_dim
        size = pool.dtype.itemsize
        index, appended = indices(part, tokens)
        asked = torch.zeros(pool.layers, dtype=torch.bool)
        asked[list(asked_layers(part.rows, pool.layer_kinds))] = True
        queries = len(part.tokens)
        picked = 0 if index is None else queries * heads * d
        picked += 0 if len(appended) == tokens else pool.planes * len(appended) * pool.kv_heads * d
        packed = torch.empty(picked, dtype=pool.dtype)
        answer = torch.empty(queries * heads * (dv + 1), dtype=torch.float32)
        self._kept += [index, appended, packed, answer, asked]
        self._answers.append(bytes_of(answer))
        holder.fd, holder.asked = channel.fileno(), asked.data_ptr()
        if self._ring is not None:
            holder.peer = self._ring.native.number(channel.peer)
        holder.q_index, holder.queries = None if index is None else index.data_ptr(), queries
        holder.q_bytes, holder.kv_bytes = heads * d * size, pool.kv_heads * d * size
        holder.kv_index = None if len(appended) == tokens else appended.data_ptr()
        holder.appended = len(appended)
        holder.packed, holder.answer, holder.answer_bytes = packed.data_ptr(), answer.data_ptr(), answer.nbytes
        holder.part_lse = answer[queries * heads * dv :].data_ptr()
        length = queries * holder.q_bytes + pool.planes * len(appended) * holder.kv_bytes
        for name, kind, count in (("ask", Kind.ATTEND, length), ("expected", Kind.PARTIAL, answer.nbytes)):
            header = Header(kind, gang.number, gang.epoch, length=count)
            setattr(holder, name, HeaderBytes.from_buffer_copy(header.pack()))

    def _length(self, at: int) -> int:
        holder = self._holders[at]
        return int(holder.queries * holder.q_bytes + self._asking.pool.planes * holder.appended * holder.kv_bytes)

    def _expected(self, at: int, layer: int, step: int) -> tuple[Header, memoryview]:
        gang, answer = self._asking.gang, self._answers[at]
        return Header(Kind.PARTIAL, gang.number, gang.epoch, layer, step, len(answer)), answer

    def _fail(self, status: int, layer: int, step: int) -> None:
        """Raise for a status of the last call; a broken channel finds the reason itself, by reading further."""
        home = self._home
        if status == _LATE and len(self._channels) > 1:
            whole = zip(self._channels, self._holders, strict=True)
            missing = {
                channel.peer for channel, one in whole if one.due and one.received < HEADER_BYTES + one.answer_bytes
            }
            raise late(missing, self._asking.limit)
        channel, holder = self._channels[home.culprit], self._holders[home.culprit]
        expected, answer = self._expected(home.culprit, layer, step)
        error = errno.EAGAIN if status == _LATE else home.error
        channel.go_on(bytes(holder.got), holder.received, expected, answer, error)
        raise ChannelError(f"the channel to {channel.peer} could not be read, for an unknown reason")


def new_exchange(
    asking: Asking, ring: Ring | None = None, in_python: Callable[[Asking], Exchange] = PythonExchange
) -> Exchange:
    """In C++ if all channels are plain sockets and the library is loaded, else in Python; recorded in a ring."""
    library = wire()
    plain = all(type(channel) in (TcpChannel, UnixChannel) for _, channel, _ in asking.holders)
    if library is None or not plain or not asking.pool.device.is_host:
        return in_python(asking)
    return NativeExchange(asking, library, ring)
