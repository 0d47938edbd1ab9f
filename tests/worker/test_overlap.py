"""A home asks all holders before it computes anything itself, beginning with the one that will take longest."""

from __future__ import annotations

import socket
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from _peers import HEAD_DIM, HEADS, KV_HEADS

from distkv_dask.gang import Gang
from distkv_dask.worker.blocks.pool import Pool
from distkv_dask.worker.channels.bodies import Row
from distkv_dask.worker.home.attention import DistAttention
from distkv_dask.worker.plan import Part
from distkv_dask.worker.shard import Shard


class Answering:
    """A channel whose holder answers at once, with nothing."""

    def __init__(self, peer: str, log: list[str]) -> None:
        self.peer = peer
        self._log = log
        self.mine, self.its = socket.socketpair()

    def send(self, header: Any, *buffers: Any) -> None:
        self._log.append(f"ask {self.peer}")
        self.its.send(b"x")

    def recv_into(self, expected: Any, buffer: memoryview) -> None:
        self.mine.recv(1)
        buffer[:] = bytes(len(buffer))

    def fileno(self) -> int:
        return self.mine.fileno()

    def close(self) -> None:
        self.mine.close()
        self.its.close()


def test_queries_leave_before_local_attention_and_first_to_whom_has_most_work(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    log: list[str] = []
    attend = Shard.attend
    monkeypatch.setattr(Shard, "attend", lambda *args: (log.append("attend locally"), attend(*args))[1])
    channels = {worker: Answering(worker, log) for worker in ("few", "none yet", "many", "some")}
    rows = {"few": 10, "none yet": 0, "many": 9000, "some": 500}
    parts = {
        worker: Part((Row(7, length, 1, worker == "none yet", ((0, length + 1),), (length,)),), (0,))
        for worker, length in rows.items()
    }
    parts["w0"] = Part((Row(1, 30, 1, False, ((0, 40),), (30,)),), (0,))
    gang = SimpleNamespace(gang=Gang("engine", 1, "gang-1", 1, "w0", ()), channels=channels, timeout_receive=5.0)
    attention = DistAttention(gang, parts, 1, pool, HEADS)  # type: ignore[arg-type]
    q, kv = torch.randn(1, HEADS, HEAD_DIM), torch.randn(1, KV_HEADS, HEAD_DIM)
    attention.attend(0, q, kv, kv, 0.125)
    attention.close()
    for channel in channels.values():
        channel.close()
    assert log == ["ask many", "ask some", "ask few", "ask none yet", "attend locally"]
