"""The state of one engine's state machine. Packages of the scheduler are functions of it."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from distkv_dask.config import Config
from distkv_dask.scheduler.commands import Command
from distkv_dask.scheduler.costs.calibration import Calibration
from distkv_dask.scheduler.costs.model import PerformanceModel
from distkv_dask.scheduler.costs.pacer import Pacer
from distkv_dask.scheduler.costs.presets import PRESET
from distkv_dask.scheduler.ledger.ledger import Ledger
from distkv_dask.scheduler.policies import policy_named
from distkv_dask.scheduler.policies.base import Policy
from distkv_dask.scheduler.policies.queue import Queue
from distkv_dask.scheduler.records.cached import CachedSequences
from distkv_dask.scheduler.records.disks import Disks
from distkv_dask.scheduler.records.extents import Extents
from distkv_dask.scheduler.records.kinds import Demand
from distkv_dask.scheduler.records.moves import Moves
from distkv_dask.scheduler.records.prefix_index import PrefixIndex
from distkv_dask.scheduler.records.request import Request
from distkv_dask.scheduler.records.snapshots import Snapshots
from distkv_dask.scheduler.records.starts import Starts
from distkv_dask.scheduler.records.states import State
from distkv_dask.scheduler.records.window_chain import WindowChain


@dataclass(slots=True)
class MachineState:
    """One engine's requests, and everything that decides about them.

    Parameters
    ----------
    engine
        The engine's id.
    config
        The engine's settings.
    numbers
        Numbers of gangs and moves, unique over all engines of the gManager.
    pacer
        The scheduler's budget, which all engines share.
    block_bytes
        Bytes of one block, once they are known.
    """

    engine: str
    config: Config
    numbers: Iterator[int]
    pacer: Pacer = field(default_factory=Pacer)
    block_bytes: int = 0
    home_bytes: int = 0
    """Bytes of state that a home has of a sequence, besides KV in blocks."""
    now: float = 0.0
    """The gManager's clock at the event that is being handled, in seconds."""
    arrived: float = -math.inf
    """When the last requests arrived."""
    ledger: Ledger = field(init=False)
    requests: dict[int, Request] = field(default_factory=dict)
    queue: Queue = field(init=False)
    calibration: Calibration = field(init=False)
    chains: dict[str, WindowChain] = field(default_factory=dict)
    """Decode windows by home."""
    ordinals: dict[str, int] = field(default_factory=dict)
    """Short numbers of homes, for the names of their gangs."""
    in_prefill: dict[int, None] = field(default_factory=dict)
    """Sequences whose chunks are being computed."""
    starts: Starts = field(default_factory=Starts)
    moves: Moves = field(default_factory=Moves)
    leaving: set[str] = field(default_factory=set)
    """Workers that are about to leave."""
    paused: set[str] = field(default_factory=set)
    """Workers that Dask has paused for their memory."""
    index: PrefixIndex = field(init=False)
    """Stored documents by prefix."""
    running: PrefixIndex = field(init=False)
    """Running requests by prefix, whose KV others may share."""
    cache: CachedSequences = field(init=False)
    """Finished sequences with cached blocks."""
    extents: Extents = field(default_factory=Extents)
    """Copies of their blocks in lower tiers."""
    snapshots: Snapshots = field(default_factory=Snapshots)
    disks: Disks = field(default_factory=Disks)
    largest_blocks: int = 0
    """Blocks of the largest request that could ever run."""
    lowest_priority: float = float("inf")
    """The lowest priority of all requests so far."""
    is_closing: bool = False
    commands: list[Command] = field(default_factory=list)
    """Commands of the current event, in order."""
    recommendations: deque[tuple[Request, State]] = field(default_factory=deque)
    """Recommended states of requests, in order."""
    idle_documents: dict[int, None] = field(default_factory=dict)
    """Documents that may no longer be needed."""
    idle_homes: dict[str, None] = field(default_factory=dict)
    """Homes that may need another window."""

    def __post_init__(self) -> None:
        """Build the parts that depend on the configuration."""
        self.ledger = Ledger(self.config.block_tokens, self.config.window_batch)
        self.queue = Queue(self.ledger, policy_named(self.config.policy, PRESET))
        self.calibration = Calibration(self.ledger)
        self.index = PrefixIndex(self.config.block_tokens)
        self.running = PrefixIndex(self.config.block_tokens)
        self.cache = CachedSequences(self.config.prefix_cache)

    @property
    def policy(self) -> Policy:
        """Decides the order of requests, placements and moves."""
        return self.queue.policy

    @property
    def speculates(self) -> bool:
        """Whether homes speculate; recurrent layers could not undo wrong proposals."""
        return self.config.speculation != "off" and not self.ledger.has_states

    def document_of(self, request: Request) -> Request | None:
        """The sequence whose blocks a request shares, if it has one that still exists."""
        return None if request.parent is None else self.requests.get(request.parent.number)

    def demand(self, number: int) -> Demand:
        """Who needs a sequence that others may share."""
        demand = self.requests[number].demand
        assert demand is not None
        return demand

    def is_drained(self, worker: str) -> bool:
        """Whether a worker has no blocks."""
        return worker not in self.ledger.workers or not self.ledger.workers[worker].held

    def know_costs(self, model: PerformanceModel) -> None:
        """Use this performance model from now on, calibrated by windows."""
        self.queue.policy = replace(self.policy, model=self.calibration.follow(model))

    def keep_states(self, nbytes: int) -> None:
        """Homes have ``nbytes`` of a sequence's state: it stays there, and begins with a snapshot or at 0."""
        self.ledger.has_states, self.home_bytes = True, nbytes

    def command(self, command: Command) -> None:
        """Add a command to the gManager."""
        self.commands.append(command)

    def recommend(self, request: Request, state: State) -> None:
        """Recommend a state for a request; applied after the current function."""
        self.recommendations.append((request, state))
