"""Several runtimes in one process, wired over real loopback channels and driven by hand instead of by a cluster."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import replace
from functools import cache
from typing import Any

from _channels import TCP, Way
from _models import Reference, model_dir, prompt_ids, reference_generate
from torch import Tensor

from distkv_dask.config import Config
from distkv_dask.gang import DecodeWindow, Gang, PrefillChunk, SequenceState, WindowResult
from distkv_dask.messages.names import EngineSpec
from distkv_dask.placement import Placement, Span
from distkv_dask.sampling import SamplingParams
from distkv_dask.worker.blocks.pool import BlockShape, Pool
from distkv_dask.worker.device_choice import choose_device
from distkv_dask.worker.home.windows import new_windows
from distkv_dask.worker.lanes import Lanes
from distkv_dask.worker.model.load import load_model
from distkv_dask.worker.model.loaded import LoadedModel
from distkv_dask.worker.runtime import Runtime

BLOCK_TOKENS = 8
SEQUENCES = 5
"""Number of sequences for which a home has windows."""
LONGEST_CHUNK = 512
GREEDY = SamplingParams(max_new_tokens=1000, ignore_eos=True)
PROMPT, NEW = 70, 14
ROOM = PROMPT + NEW + BLOCK_TOKENS
TOKEN = "a token of this test"
WAIT = 600.0 if os.environ.get("DISTKV_TEST_DEVICE") == "emulated" else 60.0
"""Seconds to wait for a lane; a step takes ten times as long on the emulated card."""


@cache
def loaded(family: str) -> LoadedModel:
    return load_model(str(model_dir(family)), "float32", 1, device=choose_device(Config.load().device))


class Recorder:
    """A model that records the logits that it computes."""

    def __init__(self, model: Any) -> None:
        self.geometry = model.geometry
        self.eos_token_ids = model.eos_token_ids
        self.device = model.device
        self.follower = model.follower
        self.past = model.past
        self.adapter = model.adapter
        self.logits: list[Tensor] = []
        self._model = model

    def forward(self, *args: Any) -> Tensor:
        logits = self._model.forward(*args)
        self.logits.append(logits.cpu())
        return logits

    def repeated(self, inputs: Tensor, step: Any, queued: bool, past: Any, steps: int) -> Callable[[], Tensor]:
        return lambda: self.forward(inputs[0], inputs[1], step, None, past)


class Member:
    """One worker: lanes, pool and runtime."""

    def __init__(self, address: str, model: Any, blocks: int, block_tokens: int, spec: EngineSpec, way: Way) -> None:
        geometry = model.geometry
        if isinstance(model, LoadedModel):  # each worker has its own streams
            model = copy(model)
            model.device = choose_device(Config.load().device)
        self.address = address
        self.lanes = Lanes(address, "127.0.0.1", 1, way.certificates)
        block = BlockShape.of(geometry, block_tokens)
        self.pool = Pool(block, blocks, model.device)
        windows = new_windows(geometry, spec.config, address, SEQUENCES, model.device) if geometry.home_layers else None
        self.runtime = Runtime(spec, model, self.pool, self.lanes, windows)

    def close(self) -> None:
        self.runtime.close()
        self.lanes.close()


class Fleet:
    """Workers ``w0``, ``w1``, ... with one engine, and the few functions of a gManager that tests need."""

    def __init__(
        self, model: Any, size: int, way: Way = TCP, block_tokens: int = BLOCK_TOKENS, **limits: float
    ) -> None:
        settings = {"channel": way.channel, "timeout_start": 20.0, "timeout_receive": 20.0, **limits}
        settings |= {"block_tokens": block_tokens, "prefill_chunk_tokens": LONGEST_CHUNK}
        config = replace(Config.load(), **settings)
        self.spec = EngineSpec("engine", "tiny", "float32", TOKEN, config)
        blocks = 1024 // block_tokens
        self.members = {f"w{at}": Member(f"w{at}", model, blocks, block_tokens, self.spec, way) for at in range(size)}
        self._numbers = itertools.count(1)

    def close(self) -> None:
        for member in self.members.values():
            member.close()

    def gang(self, home: str, holders: Sequence[str], epoch: int = 1) -> Gang:
        number = next(self._numbers)
        endpoints = tuple(self.members[worker].lanes.endpoint for worker in holders)
        return Gang("engine", number, f"gang-{number}", epoch, home, endpoints)

    def place(self, sequence: int, *room: tuple[str, int]) -> Placement:
        """Reserve spans in order, given as (worker, tokens)."""
        spans, start = [], 0
        for worker, tokens in room:
            self.members[worker].runtime.reserve(sequence, start, start + tokens)
            spans.append(Span(worker, start, start + tokens))
            start += tokens
        return tuple(spans)

    def release_sequence(self, sequence: int) -> None:
        for member in self.members.values():
            member.runtime.release_sequence(sequence)

    def run(self, gang: Gang, call: Callable[[Runtime], Any]) -> Any:
        """Open the holders' sessions, run ``call`` in the home's lane, and wait for all."""
        sessions = [self.members[holder.worker].runtime.open_session(gang) for holder in gang.holders]
        home = self.members[gang.home]
        result = home.lanes.home.submit(call, home.runtime).result(WAIT)
        for session in sessions:
            session.wait(WAIT)
        return result

    def prefill(
        self,
        sequence: int,
        placement: Placement,
        prompt: Sequence[int],
        chunk: int = 24,
        home: str | None = None,
        sampling: SamplingParams | None = GREEDY,
    ) -> int | None:
        """Prefill in chunks, each where its KV is placed, or all at ``home``; returns the first new token, if any."""
        token = None
        for start, stop in self._pieces(placement, len(prompt), chunk):
            worker = home or next(span.worker for span in placement if span.start <= start < span.stop)
            holders = sorted({span.worker for span in placement if span.start < stop} - {worker})
            last = sampling if stop == len(prompt) else None
            gang = self.gang(worker, holders)
            piece = PrefillChunk(gang, sequence, placement, start, tuple(prompt[start:stop]), last)
            token = self.run(gang, lambda runtime, piece=piece: runtime.prefill(piece)).token
        return token

    def decode(
        self, home: str, batch: Sequence[SequenceState], steps: int, gang: Gang | None = None
    ) -> tuple[WindowResult, list[SequenceState]]:
        """Run a window; returns its result, and the states for the next one."""
        workers = {span.worker for state in batch for span in state.placement} - {home}
        window = DecodeWindow(gang or self.gang(home, sorted(workers)), 0, steps, WAIT)
        result = self.run(window.gang, lambda runtime: runtime.decode(window, batch))
        left = [state for state in batch if state.sequence not in result.finished]
        return result, [advanced(state, result.tokens[state.sequence]) for state in left]

    @staticmethod
    def _pieces(placement: Placement, tokens: int, chunk: int) -> Iterator[tuple[int, int]]:
        for span in placement:
            for start in range(span.start, min(span.stop, tokens), chunk):
                yield start, min(start + chunk, span.stop, tokens)


def advanced(state: SequenceState, tokens: Sequence[int]) -> SequenceState:
    return replace(
        state,
        length=state.length + len(tokens),
        last_token=tokens[-1],
        remaining=state.remaining - len(tokens),
        generated=(*state.generated, *tokens),
    )


@contextmanager
def fleet(model: Any, size: int, way: Way = TCP, **settings: Any) -> Iterator[Fleet]:
    made = Fleet(model, size, way, **settings)
    try:
        yield made
    finally:
        made.close()


@cache
def reference(family: str, prompt: int = PROMPT, seed: int = 0, new: int = NEW) -> Reference:
    return reference_generate(model_dir(family), [prompt_ids(prompt, seed)], new)[0]


def state(sequence: int, placement, length: int, token: int, remaining: int, **sampling) -> SequenceState:
    return SequenceState(sequence, placement, length, token, remaining, replace(GREEDY, **sampling))


def generate(made: Fleet, placement, home: str, window: int = 5, chunk: int = 24, prefill_at: str | None = None):
    first = made.prefill(1, placement, prompt_ids(PROMPT), chunk, prefill_at)
    tokens, batch = [first], [state(1, placement, PROMPT, first, NEW - 1)]
    while batch:
        result, batch = made.decode(home, batch, window)
        tokens += result.tokens[1]
    assert result.finished == {1: "length"}
    return tokens
