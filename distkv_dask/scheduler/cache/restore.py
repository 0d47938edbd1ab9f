"""Restoring: a request that begins like an earlier one reads what lower tiers have, and computes what is missing.

Extents are read into the request's own blocks, on any worker, before its prompt is computed. Missing parts between
them, such as a front that was dropped, are computed alone: KV depends only on the tokens before it, so later KV stays
valid. Other requests continue while blocks are read. If reading fails, everything is computed.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable

from distkv_dask.messages.names import OWN_DISK, Saved, SpilledFile, pool_file
from distkv_dask.messages.to_worker import Fetch
from distkv_dask.placement import Placement
from distkv_dask.scheduler.cache import lower_tiers, retention
from distkv_dask.scheduler.cache.disk import ranges_of
from distkv_dask.scheduler.commands import Count
from distkv_dask.scheduler.ledger.placements import clipped
from distkv_dask.scheduler.records.extents import Extent
from distkv_dask.scheduler.records.machine_state import MachineState
from distkv_dask.scheduler.records.prefix_index import chain
from distkv_dask.scheduler.records.request import Request
from distkv_dask.scheduler.records.states import Fetching, Prefill


def find(life: MachineState, request: Request, start: int, placement: Placement) -> Fetching | None:
    """What an admitted request can restore of the tokens from ``start`` on; None if that does not pay."""
    if not life.extents.index or not request.is_plain or request.saved is not None or life.ledger.has_states:
        return None
    known = request.known
    runs = _runs(life, known[: len(known) - 1], start, request.adapter_key)  # the last one has to be computed
    home = placement[-1].worker
    runs = [(first, last, one) for first, last, one in runs if retention.pays(life, one.place, home, first, last)]
    if not runs:
        return None
    restores: dict[int, str] = {}
    tokens: Counter[str] = Counter()
    for first, last, extent in runs:
        extent.readers.add(request.sequence)
        restores[extent.number] = extent.kind
        tokens[extent.kind] += last - first
    return Fetching(extents=tuple(restores), ranges=tuple(_joined(runs)), tokens=tokens)


def _runs(life: MachineState, tokens: array[int], start: int, adapter: str) -> list[tuple[int, int, Extent]]:
    """Ranges of tokens from ``start`` on, each with the extent that has it."""
    size, index = life.ledger.block_tokens, life.extents.index
    right: dict[int, bool] = {}
    runs: list[tuple[int, int, Extent]] = []
    for at, key in enumerate(chain(tokens, size, adapter)):
        if at * size < start or key not in index:
            continue
        there = (life.extents.by_number[number] for number in index[key])
        same = (one for one in there if one.adapter == adapter)
        usable = (one for one in same if one.is_whole and _begins(one, tokens, right))
        extent = min(usable, key=lambda one: (one.kind == "disk", -one.stop), default=None)
        if extent is None:
            continue
        if runs and runs[-1][2] is extent and runs[-1][1] == at * size:
            runs[-1] = runs[-1][0], (at + 1) * size, extent
        else:
            runs.append((at * size, (at + 1) * size, extent))
    return runs


def _begins(extent: Extent, tokens: array[int], right: dict[int, bool]) -> bool:
    """Whether a prompt begins with all of an extent's text: hashes may collide, and files are read whole."""
    if extent.number not in right:
        right[extent.number] = extent.tokens[: extent.stop] == tokens[: extent.stop]
    return right[extent.number]


def _joined(runs: Iterable[tuple[int, int, Extent]]) -> list[tuple[int, int]]:
    joined: list[tuple[int, int]] = []
    for first, last, _ in runs:
        if joined and joined[-1][1] == first:
            joined[-1] = joined[-1][0], last
        else:
            joined.append((first, last))
    return joined


def begin_reading(life: MachineState, request: Request, state: Fetching) -> None:
    """Read extents into a request's own blocks, on all of its workers at once."""
    account = life.ledger.sequences[request.sequence]
    ranges: dict[str, tuple[tuple[int, int], ...]] = {}
    for first, last in state.ranges:
        for worker, some in ranges_of(tuple(clipped(account.own, first, last)), last).items():
            ranges[worker] = (*ranges.get(worker, ()), *some)
    if not all(number in life.extents.by_number for number in state.extents):  # its own room was theirs
        life.recommend(request, Prefill(request.reuse.shared))
        return
    files = tuple(_file(life.extents.by_number[number]) for number in state.extents)
    state.ask(ranges, life.now)
    for worker, some in ranges.items():
        wanted = tuple(file for file in files if any(file.start < last and first < file.stop for first, last in some))
        life.command(Fetch(worker, request.sequence, some, Saved(OWN_DISK, wanted)))


def _file(extent: Extent) -> SpilledFile:
    if extent.file is not None:
        return extent.file
    return pool_file(extent.number, extent.start, extent.stop, extent.worker)


def fetched(life: MachineState, request: Request, state: Fetching) -> None:
    """All of a request's workers have read the kept parts of its text, or failed: then those are computed."""
    extents = [life.extents.by_number[number] for number in state.extents if number in life.extents.by_number]
    for extent in extents:
        extent.readers.discard(request.sequence)
    if state.failure is not None or state.spoilt:
        for extent in extents if state.failure is not None else ():
            lower_tiers.give_up(life, extent)  # one of them is damaged, or its worker does not answer
        life.recommend(request, Prefill(request.reuse.shared))
        return
    for extent in extents:
        life.extents.touch(extent, life.now)
    for kind, tokens in state.tokens.items():
        life.command(Count(f"reused_{kind}_tokens", tokens))
    request.reuse.restored = state.tokens.total()
    missing = _between(request.reuse.shared, state.ranges)
    life.ledger.commit(request.sequence, missing[0][0] if missing else state.ranges[-1][1])
    life.recommend(request, Prefill(state.ranges[-1][1], missing))


def _between(start: int, ranges: Iterable[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """The gaps between ``start`` and the last of these ranges.

    Examples
    --------
    >>> _between(0, [(4, 8), (8, 12), (16, 20)])
    ((0, 4), (12, 16))
    """
    missing: list[tuple[int, int]] = []
    for first, last in ranges:
        if first > start:
            missing.append((start, first))
        start = last
    return tuple(missing)
