"""The status of an engine, from its state machine, its figures and its workers' reports. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict

from distkv_dask.messages.from_worker import Opened
from distkv_dask.messages.measured_link import MeasuredLink
from distkv_dask.messages.status import (
    BlockCounts,
    Debt,
    EngineStatus,
    SchedulerLoad,
    SequenceStatus,
    TierCounts,
    WorkerPerformance,
    WorkerStatus,
)
from distkv_dask.scheduler.engines.figures import Figures
from distkv_dask.scheduler.lifecycle.stalls import aside
from distkv_dask.scheduler.records.kinds import Document
from distkv_dask.scheduler.records.machine_state import MachineState
from distkv_dask.scheduler.records.request import Request
from distkv_dask.scheduler.records.states import ASIDE


def status_of(life: MachineState, figures: Figures, facts: Mapping[str, Opened]) -> EngineStatus:
    """Take a snapshot of an engine.

    Parameters
    ----------
    life, figures
        The engine's.
    facts
        Each worker's report when it opened the engine, by address.
    """
    ledger, model = life.ledger, life.policy.model
    lent = ledger.owes.by_creditor()
    finished = {f"finished_{reason}": number for reason, number in figures.finished.items()}
    return EngineStatus(
        workers={worker: _worker(life, worker, lent[worker], facts.get(worker)) for worker in ledger.workers},
        # Cached sequences belong to no request, but others may share them.
        sequences={number: _sequence(life, one) for number, one in life.requests.items() if not one.is_cached},
        debts=tuple(Debt(debtor, creditor, blocks) for (debtor, creditor), blocks in ledger.owes.by_pair().items()),
        epoch=ledger.epoch,
        block_tokens=ledger.block_tokens,
        scheduler=SchedulerLoad(life.pacer.rate, life.pacer.task_seconds, life.pacer.load),
        state_bytes=max((opened.geometry.home_bytes for opened in facts.values()), default=0),
        speculation=_speculation(life),
        exchange_seconds=model.exchange(model.inside, 1),
        links=tuple(MeasuredLink(*both, link.latency, link.bandwidth) for both, link in sorted(model.links.items())),
        totals={**figures.totals, **finished, "moved_blocks": life.moves.moved_blocks},
    )


def _speculation(life: MachineState) -> str:
    chosen = str(life.config.speculation)
    return chosen if life.speculates or chosen == "off" else "off: recurrent state and windows cannot be rolled back"


def tiers_of(life: MachineState, worker: str) -> dict[str, int]:
    """Blocks of finished requests on a worker, by tier."""
    copies = life.extents.blocks[worker, "workers"]
    memory = life.ledger.workers[worker].cached - copies
    return {"memory": memory, "workers": copies, "disk": life.extents.on_disk(worker)}


def _worker(life: MachineState, worker: str, lent: int, opened: Opened | None) -> WorkerStatus:
    account = life.ledger.workers[worker]
    kept = opened.adapters if opened else None
    return WorkerStatus(
        role="instance" if account.can_decode else "memory",
        capacity_blocks=account.capacity,
        used_blocks=account.used,
        lent_blocks=lent,
        blocks=BlockCounts(**account.parts()),
        tiers=TierCounts(**tiers_of(life, worker)),
        block_bytes=life.block_bytes,
        disk_bytes=life.disks.disk.used[worker],
        disk_error=life.extents.failed[worker][1] if worker in life.extents.failed else "",
        host_bytes=life.disks.memory.used[worker],
        sequences=account.homed,
        channels=opened.channels if opened else "",
        device=opened.device if opened else "",
        kernels=opened.kernels if opened else "",
        weights=opened.weights if opened else "",
        adapters=kept.paths if kept else (),
        adapter_bytes=kept.nbytes if kept else 0,
        window_seconds=life.chains[worker].seconds,
        performance=WorkerPerformance(
            **asdict(life.policy.model.of(worker)),
            measured=opened is not None and opened.measured is not None,
            slower=life.calibration.slower(worker),
        ),
    )


def _sequence(life: MachineState, request: Request) -> SequenceStatus:
    account, demand = life.ledger.sequences.get(request.sequence), request.demand
    why = aside(life, request)
    return SequenceStatus(
        state=ASIDE if why else request.state.label,
        aside=why,
        document=request.is_document,
        name=request.kind.name if isinstance(request.kind, Document) else "",
        saved=request.is_save or request.saved is not None,
        prompt_tokens=len(request.prompt),
        generated_tokens=len(request.generated),
        questions=sum(not life.requests[one].is_document for one in demand.dependents) if demand is not None else 0,
        kv_tokens=account.length if account else 0,
        home=account.home if account else None,
        placement=account.placement if account else (),
    )
