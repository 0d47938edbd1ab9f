"""A layer's exchange through host memory: queries to the host, a socket round trip, partials to the card."""

from __future__ import annotations

import socket
import statistics
import threading
import time
from typing import Any

import torch

from _smoke.kernels import GROUP, KV_HEADS, Card, D
from distkv_dask.worker.device import Device
from distkv_dask.worker.device_choice import choose_device

HEADS = KV_HEADS * GROUP


def host(card: Card, figures: dict[str, Any]) -> None:
    """Microseconds of a layer's exchange with a holder that answers at once, by rows of the batch."""
    device = choose_device("cuda")
    for rows in (1, 8, 64)[: 1 if card.small else 3]:
        figures[f"{rows}_rows_us"] = round(_exchange(device, rows, 3 if card.small else 60) * 1e6, 1)


def _exchange(device: Device, rows: int, repeats: int) -> float:
    question = device.pair((rows * HEADS * D,), torch.bfloat16)
    answer = device.pair((rows * HEADS * (D + 1),), torch.float32)
    answer.host.zero_()
    asked, answered = (one.host.view(torch.uint8).numpy().data for one in (question, answer))
    near, far = socket.socketpair()
    holder = threading.Thread(target=_hold, args=(far, len(asked), len(answered), repeats), daemon=True)
    holder.start()
    seconds = []
    with near:
        for _ in range(repeats):
            device.finish()
            began = time.perf_counter()
            question.down()
            device.mark().wait()
            near.sendall(asked)
            _receive(near, answered)
            answer.up()
            device.finish()
            seconds.append(time.perf_counter() - began)
    holder.join()
    return statistics.median(seconds)


def _hold(far: socket.socket, asked: int, answered: int, repeats: int) -> None:
    """Answer with zeros."""
    question, answer = bytearray(asked), bytes(answered)
    with far:
        for _ in range(repeats):
            _receive(far, memoryview(question))
            far.sendall(answer)


def _receive(channel: socket.socket, into: memoryview) -> None:
    while into:
        into = into[channel.recv_into(into) :]
