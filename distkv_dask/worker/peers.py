"""Calls between rManagers over Dask's own comm: pieces of moving blocks, and spilled blocks; links are measured."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from distributed import Worker
from distributed.protocol.serialize import to_serialize

from distkv_dask.errors import DistKVError, in_words
from distkv_dask.messages.names import TIME_LINK, Piece, SpilledFile, ToPeer, Transfer, pack, unpack
from distkv_dask.messages.to_worker import Send

if TYPE_CHECKING:
    import numpy as np

    from distkv_dask.worker.engine import WorkerEngine


@dataclass(frozen=True, slots=True)
class SpilledRows:
    """Blocks of a file that its worker has read: uint8 [count, bytes of a block]. They are sent without a copy."""

    rows: np.ndarray


@dataclass(frozen=True, slots=True)
class Refused:
    """Why a worker does not do what another one asked for."""

    reason: str


class Peers:
    """Both ends of these calls.

    Parameters
    ----------
    worker
        This worker.
    engines
        Engines that are open here.
    """

    def __init__(self, worker: Worker, engines: Mapping[str, WorkerEngine]) -> None:
        self._worker = worker
        self._engines = engines
        self._sending: dict[asyncio.Task[None], str] = {}

    @property
    def handlers(self) -> dict[str, Callable[..., Any]]:
        """Handlers for calls, by Dask's operation."""
        return {ToPeer.BLOCKS: self._take_blocks, ToPeer.SPILLED: self._read_spilled, TIME_LINK: self._time_link}

    def send_blocks(self, engine: str, send: Send) -> None:
        """Copy blocks of an engine to another worker in the background."""
        peer = partial(self._send_piece, engine, send.target)
        tokens = range(send.start, send.stop)
        sending = self._engines[engine].send(peer, send.transfer, send.sequence, tokens, send.pace)
        task = asyncio.create_task(sending)
        self._sending[task] = engine
        task.add_done_callback(self._sending.pop)

    def stop_sending(self, engine: str) -> None:
        """Stop sending blocks of a closing engine."""
        for task, sender in self._sending.items():
            if sender == engine:
                task.cancel()

    async def _send_piece(self, engine: str, target: str, piece: Piece, data: np.ndarray) -> str:
        """Send a piece of a block to another worker; returns the reason if it is refused."""
        answer: str = await self._worker.rpc(target).distkv_blocks(
            engine=engine, piece=tuple(piece), data=to_serialize(data)
        )
        return answer

    async def ask_spilled(self, engine: str, file: SpilledFile, first: int, count: int) -> np.ndarray | str:
        """Blocks that another worker has spilled, uint8 [count, bytes]; raises the reason if it has none."""
        packed = await self._worker.rpc(file.worker).distkv_spilled(
            engine=engine, file=tuple(file), first=first, count=count
        )
        answer: SpilledRows | Refused = unpack(packed)
        return answer.rows if isinstance(answer, SpilledRows) else answer.reason

    async def _take_blocks(self, engine: str, piece: Sequence[Any], data: np.ndarray) -> str:
        """Receive a piece of a block from another worker; returns the reason if it is refused."""
        if engine not in self._engines:
            return self._not_open(engine)
        store = partial(self._engines[engine].store_piece, Piece(Transfer(*piece[0]), *piece[1:]), data)
        return await asyncio.get_running_loop().run_in_executor(None, store)

    async def _read_spilled(self, engine: str, file: Sequence[Any], first: int, count: int) -> Any:
        """Return blocks spilled here to another worker (packed SpilledRows), or why there are none (packed Refused)."""
        if engine not in self._engines:
            return pack(Refused(self._not_open(engine)))
        try:
            return pack(SpilledRows(await self._engines[engine].files.rows(SpilledFile(*file), first, count)))
        except DistKVError as error:
            return pack(Refused(str(error)))

    async def _time_link(self, engine: str, peer: Any) -> Any:
        """Measure the link with another worker (packed LinkTimes), or say why that failed (packed text)."""
        if engine not in self._engines:
            return pack(self._not_open(engine))
        from distkv_dask.worker.timing.link import link_times  # imports torch, as the open engine has

        try:
            times = partial(link_times, self._engines[engine].runtime, unpack(peer))
            return pack(await asyncio.get_running_loop().run_in_executor(None, times))
        except (DistKVError, OSError) as error:
            return pack(in_words(error))

    def _not_open(self, engine: str) -> str:
        return f"engine {engine} is not open on worker {self._worker.address}"
