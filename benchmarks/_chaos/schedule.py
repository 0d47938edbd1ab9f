"""The schedule of faults and load: pure functions of a seed, so that a run can be repeated."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from random import Random
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")

WEIGHTS = {
    "kill": 5,  # a worker's process; its nanny starts another one
    "kill-several": 2,  # two at the same time
    "kill-machine": 2,  # a nanny with its workers; another machine comes later
    "freeze": 4,  # SIGSTOP, and SIGCONT later
    "freeze-several": 1,
    "cut": 3,  # a machine's link silently drops everything
    "cut-peers": 1,  # workers do not reach each other, but the scheduler reaches all
    "join": 2,
    "retire": 2,
    "scale-up": 1,  # two machines join
    "scale-down": 1,  # two workers are retired together
    "move": 4,  # blocks of a running request or of a document
    "save": 3,
    "load": 3,
    "squeeze": 3,  # an urgent request for much memory: documents go to disk, other requests make way
    "cancel": 4,
    "kill-client": 2,  # a process with running requests and its own document
}
"""Kinds of faults and how often each is drawn."""

SHORTEST, LONGEST = 2.0, 20.0
"""How long something stays frozen or cut off, in seconds."""

LOAD = {
    "plain": 5,
    "sampled": 4,
    "stream": 4,
    "wide": 2,  # larger than any worker's memory
    "shared": 4,  # several questions on a document that many ask
    "document": 3,  # several questions on the user's own document
    "chat": 2,
    "schema": 3,
    "too-large": 1,  # must be refused
}
"""Kinds of requests and how often each is drawn."""


VARIED = {
    "policy": ["overflow", "overflow", "best"],
    "prefix_cache": [True, True, False],
    "window_seconds": [0.25, 1.0],
    "prefill_chunk_tokens": [32, 128],
    "spill": ["16 GiB", "16 GiB", "4 MiB", 0],
}
"""Settings of the engine and what is drawn for each."""


class Fault(NamedTuple):
    """One fault: ``at`` a time in seconds, on the victim that ``pick`` (0 to 1) selects, lasting ``seconds``."""

    at: float
    kind: str
    pick: float
    seconds: float


class Errand(NamedTuple):
    """The next action of a user; ``pick`` (0 to 1) selects the prompt."""

    kind: str
    pick: float


def plan_faults(seed: int, seconds: float, every: float, kinds: Sequence[str] = tuple(WEIGHTS)) -> list[Fault]:
    """Faults of a run of ``seconds`` seconds, on average one in ``every`` seconds."""
    draw, at, faults = Random(f"faults {seed}"), 0.0, list[Fault]()
    while (at := at + draw.uniform(0.2, 1.8) * every) < seconds:
        (kind,) = draw.choices(kinds, [WEIGHTS[one] for one in kinds])
        faults.append(Fault(round(at, 3), kind, draw.random(), round(draw.uniform(SHORTEST, LONGEST), 3)))
    return faults


def settings(seed: int) -> dict[str, Any]:
    """Settings of the engine that differ from run to run."""
    draw = Random(f"settings {seed}")
    return {name: draw.choice(values) for name, values in VARIED.items()}


def errands(seed: int, user: int) -> Iterator[Errand]:
    """The endless actions of one user, in order."""
    draw = Random(f"user {user} of {seed}")
    while True:
        (kind,) = draw.choices(list(LOAD), [*LOAD.values()])
        yield Errand(kind, draw.random())


def picked(things: Sequence[T], pick: float) -> T:
    """The item that a number from 0 to 1 selects."""
    return things[min(int(pick * len(things)), len(things) - 1)]
