"""A short standard measurement of one engine: the first token by length of prompt, decoding by size of batch."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter

from distkv_dask.client.engine import Engine
from distkv_dask.completion import Completion
from distkv_dask.errors import CapacityError
from distkv_dask.messages.status import EngineStatus
from distkv_dask.sampling import SamplingParams

SHORT = 16
"""Tokens of each prompt of a batch: few, so that nearly all time is decoding."""


@dataclass(frozen=True, slots=True)
class Prefill:
    """One prompt alone: seconds from its submission to its first token, tokens per second of prefill, its workers."""

    prompt_tokens: int
    first_token_seconds: float
    tokens_per_second: float
    workers: int


@dataclass(frozen=True, slots=True)
class Decode:
    """A batch of short prompts: all new tokens over the time from the first of them to the last, and for each one."""

    batch: int
    tokens_per_second: float
    token_seconds: float


def room(engine: Engine) -> int:
    """Tokens whose KV fits into the memory of all workers together."""
    status: EngineStatus = engine.status()
    return sum(one.capacity_blocks for one in status.workers.values()) * status.block_tokens


def prefills(engine: Engine, lengths: Sequence[int]) -> Iterator[Prefill]:
    """Measure prompts of these lengths one after the other, after a short one that is not counted.

    Raises
    ------
    CapacityError
        A prompt is larger than the memory of all workers.
    """
    _ask(engine, [SHORT], 2, seed=0)
    for seed, length in enumerate(lengths, 1):
        began = perf_counter()
        (done,) = _ask(engine, [length], 1, seed)
        seconds = perf_counter() - began
        workers = len({span.worker for span in done.placement if span.tokens})
        yield Prefill(length, seconds, length / max(done.timings.prefill, 1e-9), workers)


def decodes(engine: Engine, batches: Sequence[int], new_tokens: int) -> Iterator[Decode]:
    """Measure batches of these sizes, each request answered with ``new_tokens`` tokens (at least 2)."""
    for seed, batch in enumerate(batches, 1000):
        done = _ask(engine, [SHORT] * batch, new_tokens, seed)
        begins = [one.timings.queued + one.timings.prefill for one in done]
        ends = [begin + one.timings.decode for begin, one in zip(begins, done, strict=True)]
        each = sum(one.timings.decode for one in done) / batch / (new_tokens - 1)
        yield Decode(batch, batch * (new_tokens - 1) / max(max(ends) - min(begins), 1e-9), each)


def _ask(engine: Engine, lengths: Sequence[int], new_tokens: int, seed: int) -> list[Completion]:
    """Prompts of random tokens, so that no two share a prefix."""
    draw, vocabulary = random.Random(seed), engine.facts.vocab_size
    prompts = [[draw.randrange(vocabulary) for _ in range(length)] for length in lengths]
    done: list[Completion] = engine.generate(prompts, SamplingParams(max_new_tokens=new_tokens, ignore_eos=True))
    for one in done:
        if one.error is not None:
            raise CapacityError(f"a prompt of {max(lengths)} tokens was not answered: {one.error}")
    return done
