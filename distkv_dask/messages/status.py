"""What the gManager says about an engine to people, programs and pages: typed here, dictionaries at the JSON edge."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, NamedTuple

from distkv_dask.placement import Placement


@dataclass(frozen=True, slots=True)
class BlockCounts:
    """The blocks of a worker's pool in parts, which make up its capacity.

    Attributes
    ----------
    own
        Of running requests whose home the worker is.
    lent
        Of running requests with another home.
    documents
        Of documents, or shared of requests that ended: no running request owns them.
    cached
        Free for whoever needs them; they still hold KV of requests that ended, which may be used again.
    free
        All others.
    """

    own: int
    lent: int
    documents: int
    cached: int
    free: int


@dataclass(frozen=True, slots=True)
class WorkerPerformance:
    """What the scheduler takes a worker's speed for (``distkv.performance``): seconds, all layers together.

    Attributes
    ----------
    step, row
        A decode step without any sequence, and what each sequence of the batch adds.
    token
        Attention of one decoding sequence over one token of KV.
    prompt, pair
        Prefill of one token without attention, and attention of one query over one token of KV.
    measured
        Whether the worker was timed; else these are a preset's.
    slower
        How many times slower than when it was timed it is lately; ``step`` and all others include it.
    """

    step: float
    row: float
    token: float
    prompt: float
    pair: float
    measured: bool
    slower: float


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """One worker of an engine.

    Attributes
    ----------
    role
        ``"memory"`` for a worker that only holds KV.
    capacity_blocks, used_blocks, lent_blocks
        Blocks of its pool; those that are reserved; those of them that other workers' sequences have.
    blocks
        The capacity in parts.
    block_bytes
        Bytes of one block.
    disk_bytes
        Bytes of KV on its disk (``distkv.spill``).
    sequences
        How many requests have their home here.
    channels
        Which kind of channel it opens to whom, and why.
    device
        What it computes on: ``"cpu"`` or a card's name; after a colon, what should be known about that.
    window_seconds
        Length of its latest decode window.
    performance
        How fast it is.
    """

    role: Literal["instance", "memory"]
    capacity_blocks: int
    used_blocks: int
    lent_blocks: int
    blocks: BlockCounts
    block_bytes: int
    disk_bytes: int
    sequences: int
    channels: str
    device: str
    window_seconds: float
    performance: WorkerPerformance


@dataclass(frozen=True, slots=True)
class SequenceStatus:
    """One request or document of an engine.

    Attributes
    ----------
    state
        ``"waiting"``, ``"prefill"``, ``"decode"``, ``"retiring"``; ``"saving"``, ``"spilling"`` or ``"fetching"`` while
        its KV goes to files or comes back; ``"document"`` for one that can be asked, ``"dropped"`` while its KV is
        given up for others; ``"aside"`` while it cannot run on the workers that stay.
    aside
        Why it is set aside; empty if it is not.
    document
        Whether it is a document.
    name
        The document's name.
    saved
        Whether its KV is in files, too.
    prompt_tokens, generated_tokens
        Tokens that it was given, and that it was answered with so far.
    questions
        Requests under way about the document.
    kv_tokens
        Tokens whose KV is stored.
    home
        Address of the worker that holds its end, and decodes it if it is a request; None while it has no place.
    placement
        Where its KV lies, in order of its tokens.
    """

    state: str
    aside: str
    document: bool
    name: str
    saved: bool
    prompt_tokens: int
    generated_tokens: int
    questions: int
    kv_tokens: int
    home: str | None
    placement: Placement

    def as_dict(self) -> dict[str, Any]:
        """For JSON; spans are (worker, start, stop)."""
        plain = {field.name: getattr(self, field.name) for field in fields(self)}
        return plain | {"placement": [(span.worker, span.start, span.stop) for span in self.placement]}


class Debt(NamedTuple):
    """How many blocks the worker ``creditor`` holds for sequences whose home is the worker ``debtor``."""

    debtor: str
    creditor: str
    blocks: int


@dataclass(frozen=True, slots=True)
class SchedulerLoad:
    """What decides the length of windows in large clusters; the same for all engines of a scheduler.

    Attributes
    ----------
    tasks_per_second
        Tasks of all engines, lately.
    task_seconds
        CPU time of the scheduler for one of them.
    core_share
        Part of one core that the scheduler takes for all that it does.
    """

    tasks_per_second: float
    task_seconds: float
    core_share: float


@dataclass(frozen=True, slots=True)
class EngineStatus:
    """Where everything of an engine is, at one moment.

    Attributes
    ----------
    workers
        By address.
    sequences
        Requests that have not ended, and documents, by number (``document.number``).
    debts
        Who holds blocks for whom.
    epoch
        Grows with every change of a placement or of the set of workers.
    block_tokens
        Tokens of one block.
    scheduler
        How busy the Dask scheduler is with decode windows.
    exchange_seconds
        What the scheduler takes one exchange of a decode step with one holder for.
    totals
        Since the engine opened: ``generated_tokens``, ``decode_steps``, ``moved_blocks``, ``finished_stop`` and others.
        What has not happened yet may be missing.
    """

    workers: Mapping[str, WorkerStatus]
    sequences: Mapping[int, SequenceStatus]
    debts: tuple[Debt, ...]
    epoch: int
    block_tokens: int
    scheduler: SchedulerLoad
    exchange_seconds: float
    totals: Mapping[str, float]

    def as_dict(self) -> dict[str, Any]:
        """For JSON, such as ``/distkv/status.json`` has."""
        return {
            "workers": {address: asdict(one) for address, one in self.workers.items()},
            "sequences": {number: one.as_dict() for number, one in self.sequences.items()},
            "debts": list(self.debts),
            "epoch": self.epoch,
            "block_tokens": self.block_tokens,
            "scheduler": asdict(self.scheduler),
            "exchange_seconds": self.exchange_seconds,
            "totals": dict(self.totals),
        }


@dataclass(frozen=True, slots=True)
class EngineSummary:
    """An engine of a cluster as anybody sees it: its model and dtype, the id of its owner's Dask client, its status."""

    model: str
    dtype: str
    client: str
    status: EngineStatus

    def as_dict(self) -> dict[str, Any]:
        """For JSON, such as ``distkv status --json`` prints."""
        return {"model": self.model, "dtype": self.dtype, "client": self.client, **self.status.as_dict()}
