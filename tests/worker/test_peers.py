"""Requests between workers, without Dask: which engine answers, and what the errors say."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from distkv_dask.errors import SavedDocumentError
from distkv_dask.messages.names import Piece, SpilledFile, ToPeer, Transfer
from distkv_dask.messages.to_worker import Send
from distkv_dask.worker.peers import Peers

FILE = SpilledFile("name", 0, 16, 8, 0, "w1")
DATA = np.arange(8, dtype=np.uint8)


class Other:
    """An engine of another worker; ``pieces`` records those that it accepted."""

    def __init__(self) -> None:
        self.pieces: list[tuple[Piece, list[int]]] = []
        self.files = self

    def store_piece(self, piece: Piece, data: np.ndarray) -> str:
        self.pieces.append((piece, data.tolist()))
        return "" if piece.transfer.number < 9 else "nobody expects move 9"

    async def rows(self, file: SpilledFile, first: int, count: int) -> np.ndarray:
        if file.name != FILE.name:
            raise SavedDocumentError(f"{file.name} is not here any more")
        return DATA[first : first + count]


class Sender:
    """An engine that sends one piece of each move, and reports the outcome."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.hold = asyncio.Event()

    async def send(self, peer: Any, transfer: Transfer, sequence: int, tokens: range, pace: float) -> None:
        self.said.append(await peer(Piece(transfer, tokens.start, 0, True), DATA))
        await self.hold.wait()


def linked(engines: dict[str, Any]) -> Peers:
    """Peers whose calls all arrive at a worker with these engines."""
    there = Peers(SimpleNamespace(address="w1"), engines)  # type: ignore[arg-type]

    class Calls:
        async def _call(self, operation: ToPeer, **given: Any) -> Any:
            given = {name: getattr(value, "data", value) if name == "data" else value for name, value in given.items()}
            return await there.handlers[operation](**given)

        async def distkv_blocks(self, **given: Any) -> Any:
            return await self._call(ToPeer.BLOCKS, **given)

        async def distkv_spilled(self, **given: Any) -> Any:
            return await self._call(ToPeer.SPILLED, **given)

    return Peers(SimpleNamespace(address="w0", rpc=lambda target: Calls()), {"engine": Sender()})  # type: ignore[arg-type]


def test_pieces_arrive_as_they_are_and_refusals_come_back() -> None:
    async def run() -> None:
        other = Other()
        peers = linked({"engine": other})
        assert await peers._send_piece("engine", "w1", Piece(Transfer("move", 3), 7, 4096, False), DATA) == ""
        assert other.pieces == [(Piece(Transfer("move", 3), 7, 4096, False), DATA.tolist())]
        assert isinstance(other.pieces[0][0], Piece), "Dask's comms make a list of it"
        assert (
            await peers._send_piece("engine", "w1", Piece(Transfer("move", 9), 0, 0, True), DATA)
            == "nobody expects move 9"
        )
        assert "engine other is not open on worker w1" in await peers._send_piece(
            "other", "w1", Piece(Transfer("move", 1), 0, 0, True), DATA
        )

    asyncio.run(run())


@pytest.mark.parametrize(
    ("engine", "file", "said"),
    [
        ("other", FILE, "engine other is not open on worker w1"),
        ("engine", FILE._replace(name="old"), "old is not here any more"),
    ],
)
def test_blocks_that_are_spilled_are_given_or_refused_with_a_reason(engine: str, file: SpilledFile, said: str) -> None:
    async def run() -> None:
        peers = linked({"engine": Other()})
        rows = await peers.ask_spilled("engine", FILE, 2, 3)
        assert isinstance(rows, np.ndarray)
        assert rows.tolist() == [2, 3, 4]
        assert await peers.ask_spilled(engine, file, 0, 1) == said

    asyncio.run(run())


def test_an_engine_that_closes_sends_no_more_and_others_go_on() -> None:
    async def run() -> None:
        peers = linked({"engine": Other(), "second": Other()})
        first, second = peers._engines["engine"], Sender()
        peers._engines["second"] = second  # type: ignore[index]
        for name in ("engine", "second"):
            peers.send_blocks(name, Send("w0", Transfer("move", 1), 5, 16, 32, "w1", 0.0))
        while not (first.said and second.said):  # type: ignore[attr-defined]
            await asyncio.sleep(0)
        peers.stop_sending("engine")
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert [*peers._sending.values()] == ["second"]
        second.hold.set()
        while peers._sending:
            await asyncio.sleep(0)

    asyncio.run(run())
