"""Wavefronts: several workers compute chunks of one prompt at once, each layer after that of the previous chunk.

A chunk waits at its worker's lane, layer by layer, for earlier chunks. So it is submitted only when the previous one
has begun: every chunk that a running one waits for is running too, and the first of them waits for nothing. So prompts
that use the same workers in different orders cannot wait for each other.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from distkv_dask.gang import Earlier, PrefillChunk
from distkv_dask.scheduler.commands import SubmitPrefill
from distkv_dask.scheduler.records.machine_state import MachineState
from distkv_dask.scheduler.records.states import Prefill
from distkv_dask.scheduler.work import replan


def is_possible(life: MachineState, state: Prefill, chunks: Collection[PrefillChunk]) -> bool:
    """Whether several of a prompt's chunks are computed at once, or may be later; then they are submitted one by one.

    After a failure, chunks are computed one after the other. So are those of models with states, which go from chunk to
    chunk, and those whose KV does not stay where it is computed.
    """
    config, again = life.config, replan.is_possible(life)
    if config.prefill_workers == 1 or (config.prefill_workers == "auto" and not again):
        return False
    if config.granularity != "window" or life.ledger.has_states or state.failures:
        return False
    stays = all(
        span.worker == chunk.gang.home
        for chunk in chunks
        for span in chunk.placement
        if span.start <= chunk.start < span.stop
    )
    several = len({chunk.gang.home for chunk in chunks}) > 1
    return stays and (several or (again and len(chunks) > 1))


def is_due(life: MachineState, state: Prefill) -> bool:
    """Whether there is a chunk that may be submitted: the one before it has begun.

    With ``auto``, a worker gets one chunk at a time, so that other requests wait for at most one.
    """
    waiting = [chunk for number, chunk in state.chunks.items() if number not in state.under_way]
    running = [chunk for number, chunk in state.chunks.items() if number in state.under_way]
    if not waiting or any(
        chunk.gang.number not in life.starts.begun and chunk.gang.number not in state.early for chunk in running[-1:]
    ):
        return False
    if not replan.is_possible(life):
        return True
    computing = {chunk.gang.home for chunk in running if chunk.gang.number not in state.early}
    return waiting[0].gang.home not in computing


def submit(life: MachineState, state: Prefill) -> None:
    """Submit the chunk that may begin next, if there is one."""
    earlier: list[Earlier] = []
    for number, chunk in state.chunks.items():
        if number not in state.under_way:
            chunk = replace(chunk, gang=replace(chunk.gang, follows=tuple(earlier)))
            state.submit(chunk)
            life.command(SubmitPrefill((chunk,)))
            return
        earlier.append(Earlier(number, chunk.gang.home))
