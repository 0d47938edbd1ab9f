"""A home in this process and holders in other processes, driven without Dask, to measure what a layer costs.

Holders are forked from one process that has imported everything, so that sixteen of them take little memory.
"""

from __future__ import annotations

import itertools
import multiprocessing
import time
from collections.abc import Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from typing import Any

from distkv_dask.config import Config
from distkv_dask.gang import DecodeWindow, Gang, SequenceState, WindowResult
from distkv_dask.messages.names import EngineSpec
from distkv_dask.placement import Span
from distkv_dask.sampling import SamplingParams
from distkv_dask.worker.blocks.pool import BlockShape, Pool
from distkv_dask.worker.lanes import Lanes
from distkv_dask.worker.model.load import load_model
from distkv_dask.worker.model.loaded import LoadedModel
from distkv_dask.worker.runtime import Runtime

GREEDY = SamplingParams(max_new_tokens=1 << 30, ignore_eos=True)
BLOCK_TOKENS = 16


def fork_server() -> ForkServerContext:
    """A process that has imported everything, from which others are forked."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", "distkv_dask.worker.runtime", "distkv_dask.worker.lanes"])
    return context


def new_pool(shape: dict[str, Any], blocks: int) -> Pool:
    """A pool of small random numbers."""
    pool = Pool(BlockShape(**shape, block_tokens=BLOCK_TOKENS), blocks)
    pool.storage.normal_()
    return pool


def _hold(number: int, spec: EngineSpec, shape: dict[str, Any], parent: Connection) -> None:
    """Hold one block, the sequence's ``number``-th, and serve gangs until the home has no more."""
    lanes = Lanes(f"holder-{number}", "127.0.0.1", 1)
    runtime = Runtime(spec, None, new_pool(shape, 1), lanes)
    runtime.reserve(1, number * BLOCK_TOKENS, (number + 1) * BLOCK_TOKENS)
    parent.send(lanes.endpoint)
    while (gang := parent.recv()) is not None:
        runtime.open_session(gang)
    runtime.close()
    lanes.close()


class Fleet:
    """A home with a model and holders of one KV block each; a context manager.

    Parameters
    ----------
    folder
        The model.
    channel
        ``"tcp"``, ``"unix"`` or ``"ucx"``.
    holders
        Number of holders.
    home_blocks
        KV blocks of the home.
    """

    def __init__(self, folder: str, channel: str, holders: int, home_blocks: int) -> None:
        config = replace(Config.load(), channel=channel)
        self._spec = EngineSpec("engine", folder, "bfloat16", "a token of this benchmark", config)
        self._lanes = Lanes("home", "127.0.0.1", 1)
        self.model: LoadedModel = self._lanes.home.submit(load_model, folder, "bfloat16", 1).result()
        geometry = self.model.geometry
        shape = {
            "layers": geometry.layers,
            "kv_heads": geometry.kv_heads,
            "head_dim": geometry.head_dim,
            "dtype": geometry.dtype,
        }
        self._runtime = Runtime(self._spec, self.model, new_pool(shape, home_blocks), self._lanes)
        context = fork_server()
        self._holders = []
        for number in range(holders):
            here, there = context.Pipe()
            process = context.Process(target=_hold, args=(number, self._spec, shape, there), daemon=True)
            process.start()
            self._holders.append((process, here))
        self._endpoints = tuple(here.recv() for _, here in self._holders)
        self._numbers = itertools.count(1)

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, *_: object) -> None:
        self._runtime.close()
        self._lanes.close()
        for process, here in self._holders:
            here.send(None)
            process.join(10)

    def decode(self, steps: int, stored: int, holders: int) -> tuple[WindowResult, float]:
        """One window over a sequence of ``stored`` tokens, of which each holder has a block and the home the rest.

        Returns
        -------
        tuple
            The window's result, and processor seconds of the home's thread.
        """
        gang, spans, start = self._gang(holders), [], 0
        for endpoint in gang.holders:
            spans.append(Span(endpoint.worker, start, start + BLOCK_TOKENS))
            start += BLOCK_TOKENS
        stop = stored + steps
        self._runtime.reserve(1, start, stop)
        spans.append(Span("home", start, stop))
        state = SequenceState(1, tuple(spans), stored, 1, steps, GREEDY)
        for _, here in self._holders[:holders]:
            here.send(gang)
        window = DecodeWindow(gang, 0, steps, 600.0)
        result, seconds = self._lanes.home.submit(self._timed, window, [state]).result()
        self._runtime.release_sequence(1)
        return result, seconds

    def _timed(self, window: DecodeWindow, batch: Sequence[SequenceState]) -> tuple[WindowResult, float]:
        began = time.thread_time()
        result = self._runtime.decode(window, batch)
        return result, time.thread_time() - began

    def _gang(self, holders: int) -> Gang:
        number = next(self._numbers)
        return Gang("engine", number, f"gang-{number}", 1, "home", self._endpoints[:holders])
