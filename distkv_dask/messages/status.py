"""The status of an engine for people, programs and pages: typed here, dictionaries only at the JSON edge."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, NamedTuple

from distkv_dask.messages.measured_link import MeasuredLink
from distkv_dask.placement import Placement


@dataclass(frozen=True, slots=True)
class BlockCounts:
    """The blocks of a worker's pool by use; they add up to its capacity.

    Attributes
    ----------
    own
        Blocks of running requests whose home is this worker.
    lent
        Blocks of running requests with another home.
    documents
        Blocks of documents, and shared blocks of finished requests: no running request owns them.
    cached
        Free blocks that still hold reusable KV of finished requests.
    free
        All other blocks.
    """

    own: int
    lent: int
    documents: int
    cached: int
    free: int


@dataclass(frozen=True, slots=True)
class TierCounts:
    """Blocks of finished requests that a worker keeps for later ones, by tier (``distkv.prefix-cache-tier``).

    Attributes
    ----------
    memory
        Blocks in the pool in which they were computed. With ``workers`` they are the ``cached`` blocks of the pool.
    workers
        Copies of blocks of other workers, in this worker's pool.
    disk
        Copies on its disk.
    """

    memory: int
    workers: int
    disk: int


@dataclass(frozen=True, slots=True)
class WorkerPerformance:
    """The scheduler's estimate of a worker's speed (``distkv.performance``), in seconds for all layers together.

    Attributes
    ----------
    step, row
        A decode step without any sequence, and what each sequence of the batch adds.
    token
        Attention of one decoding sequence over one token of KV.
    prompt, pair
        Prefill of one token without attention, and attention of one query over one token of KV.
    measured
        Whether the worker was timed; otherwise the figures are a preset's.
    slower
        Factor by which the worker is slower now than when it was timed; ``step`` and the others include it.
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
        Blocks of its pool; its reserved blocks; reserved blocks that belong to other workers' sequences.
    blocks
        The capacity by use.
    tiers
        Blocks of finished requests by tier.
    block_bytes
        Bytes of one block.
    disk_bytes
        Bytes of KV on its disk (``distkv.spill``).
    disk_error
        Why its disk took no KV of finished requests when that was last tried; empty if it did.
    host_bytes
        Bytes of KV that went from its card to its host memory (``distkv.host-memory``).
    sequences
        Number of requests whose home is this worker.
    channels
        Which kinds of channel it opens to which workers, and why.
    device
        What it computes on: ``"cpu"`` or a card's name; after a colon, a note on it.
    kernels
        Which attention kernels it uses, and why: if instruction sets were measured, the figure of each.
    weights
        Where the model's weights are: mapped from a file that its machine's workers share, or elsewhere, and why.
    adapters, adapter_bytes
        Folders of the LoRA adapters that it has in memory (``distkv.adapters``), and the bytes of all of them.
    window_seconds
        Length of its latest decode window.
    performance
        Its speed.
    """

    role: Literal["instance", "memory"]
    capacity_blocks: int
    used_blocks: int
    lent_blocks: int
    blocks: BlockCounts
    tiers: TierCounts
    block_bytes: int
    disk_bytes: int
    disk_error: str
    host_bytes: int
    sequences: int
    channels: str
    device: str
    kernels: str
    weights: str
    adapters: tuple[str, ...]
    adapter_bytes: int
    window_seconds: float
    performance: WorkerPerformance


@dataclass(frozen=True, slots=True)
class SequenceStatus:
    """One request or document of an engine.

    Attributes
    ----------
    state
        ``"waiting"``, ``"prefill"``, ``"decode"``, ``"retiring"``; ``"saving"``, ``"spilling"`` or ``"fetching"`` while
        its KV is written to files or read back; ``"document"`` for a document that can be asked, ``"dropped"`` while it
        is evicted; ``"aside"`` while it cannot run on the remaining workers.
    aside
        Why it is set aside; empty otherwise.
    document
        Whether it is a document.
    name
        The document's name.
    saved
        Whether its KV is also in files.
    prompt_tokens, generated_tokens
        Tokens of the prompt, and tokens generated so far.
    questions
        Running requests about the document.
    kv_tokens
        Tokens whose KV is stored.
    home
        Address of the worker that holds its last tokens and, for a request, decodes it; None while it has no placement.
    placement
        Where its KV is, in the order of its tokens.
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
        Recent rate of tasks of all engines.
    task_seconds
        CPU time of the scheduler for one task.
    core_share
        Fraction of one core that the scheduler uses in total.
    """

    tasks_per_second: float
    task_seconds: float
    core_share: float


@dataclass(frozen=True, slots=True)
class EngineStatus:
    """A snapshot of an engine: where everything is.

    Attributes
    ----------
    workers
        Workers by address.
    sequences
        Unfinished requests and documents, by number (``document.number``).
    debts
        Who holds blocks for whom.
    epoch
        Grows with every change of a placement or of the set of workers.
    block_tokens
        Tokens of one block.
    scheduler
        How busy the Dask scheduler is with decode windows.
    state_bytes
        Bytes that only the home of a sequence has: a state, if the model has recurrent layers, and KV of layers that
        see a short window; 0 for other models. Such a sequence stays at its home until that worker leaves, and others
        can share its tokens only up to a snapshot that the home kept.
    speculation
        How many tokens decode steps propose (``distkv.speculation``): ``"auto"``, a number or ``"off"``, with the
        reason if it differs from the setting.
    exchange_seconds
        The scheduler's estimate for one exchange of a decode step with one holder on the same host.
    links
        Links that were measured.
    totals
        Since the engine opened: ``generated_tokens``, ``decode_steps``, ``accepted_tokens``, ``moved_blocks``,
        ``reused_disk_tokens``, ``finished_stop`` and others.
        A counter may be missing until its event has happened.
    """

    workers: Mapping[str, WorkerStatus]
    sequences: Mapping[int, SequenceStatus]
    debts: tuple[Debt, ...]
    epoch: int
    block_tokens: int
    scheduler: SchedulerLoad
    state_bytes: int
    speculation: str
    exchange_seconds: float
    links: tuple[MeasuredLink, ...]
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
            "state_bytes": self.state_bytes,
            "speculation": self.speculation,
            "exchange_seconds": self.exchange_seconds,
            "links": [one._asdict() for one in self.links],
            "totals": dict(self.totals),
        }


@dataclass(frozen=True, slots=True)
class EngineSummary:
    """An engine of a cluster as every client sees it: model and dtype, the id of its owner's Dask client, status."""

    model: str
    dtype: str
    client: str
    status: EngineStatus

    def as_dict(self) -> dict[str, Any]:
        """For JSON, such as ``distkv status --json`` prints."""
        return {"model": self.model, "dtype": self.dtype, "client": self.client, **self.status.as_dict()}
