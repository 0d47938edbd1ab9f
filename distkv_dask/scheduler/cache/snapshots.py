"""Snapshots of models whose homes have state besides KV: where they are taken, which are dropped, what can use them.

A model with recurrent layers, or with windows at homes, cannot continue from KV alone. So a home keeps the state of a
sequence after some of its tokens: after a document, and at some points within any prompt. A snapshot takes a free place
of a home, as cached blocks take free blocks: when the place is needed, the least recently used are dropped.

Within a prompt, snapshots are taken between chunks, each twice as far from the prompt's beginning, or from its end, as
the previous one: prompts that begin alike diverge early (a system prompt) or late (a question on a text). Another one
is taken exactly where a prompt diverges from an earlier one, for a third prompt.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence

from distkv_dask.messages.to_worker import Begin, Keep
from distkv_dask.scheduler.records.machine_state import MachineState
from distkv_dask.scheduler.records.prefix_index import chain
from distkv_dask.scheduler.records.request import Request

LEAST = 1 / 8
"""Part of a chunk that a snapshot at a divergence must save, because it takes an additional forward."""

# Where they are taken


def border(life: MachineState, request: Request, start: int) -> int:
    """Where a prompt, computed from ``start`` on, diverges from an earlier one, if a snapshot pays there; else 0."""
    if not life.ledger.has_states or request.is_document:
        return 0
    least = start + max(1, int(LEAST * life.config.prefill_chunk_tokens))
    common = request.reuse.common
    return common if least <= common < request.known_tokens else 0


def plan(life: MachineState, request: Request, ends: Sequence[int]) -> set[int]:
    """The chunks of a prompt after which snapshots are taken; other snapshots are dropped for them.

    Parameters
    ----------
    ends
        Where its chunks end, in order.
    """
    home, size = life.ledger.sequences[request.sequence].home, life.ledger.block_tokens
    if not life.ledger.has_states or not life.cache.enabled:
        return set()
    between = [end for end in ends[:-1] if end % size == 0]
    doubled = [2**power for power in range(len(between).bit_length())]
    late, early = [between[-at] for at in doubled], [between[at - 1] for at in doubled]
    best = dict.fromkeys([*(end for end in between if end == request.reuse.common), *late, *early])
    wanted = sorted([*best][: _room(life, home)])
    if wanted:
        keys = list(chain(request.known[: wanted[-1]], size, request.adapter_key))
        for tokens in wanted:
            life.snapshots.add(request.sequence, tokens, home, keys[tokens // size - 1])
        make_room(life, home)
    return set(wanted)


# Use


def find(life: MachineState, tokens: array[int], adapter: str) -> Iterable[tuple[int, int]]:
    """Sequences with a snapshot after tokens with which a prompt begins, by their hash; the longest beginning first."""
    index, size = life.snapshots.index, life.ledger.block_tokens
    chained = enumerate(chain(tokens, size, adapter) if index else (), 1)
    keys = [(key, at * size) for at, key in chained if key in index]
    return ((number, length) for key, length in reversed(keys) for number in index[key])


def nearest(life: MachineState, document: int, tokens: int) -> tuple[int, int] | None:
    """The sequence, and the tokens, of the last snapshot in the first tokens of a document, or before its own."""
    ends = {document: tokens}
    for span in life.ledger.sequences[document].placement:
        if span.document is not None:
            ends[span.document] = min(tokens, span.stop)
    found = [(at, one) for one, end in ends.items() for at in life.snapshots.of.get(one, ()) if at <= end]
    return max(found)[::-1] if found else None


def begin_with_snapshot(life: MachineState, request: Request, tokens: int) -> None:
    """Let an admitted request begin with the snapshot that it found."""
    if not life.ledger.has_states or not tokens or request.is_save:
        return
    begins = request.reuse.begins
    assert begins is not None
    if tokens in life.snapshots.of.get(begins, ()):
        life.snapshots.touch(begins, tokens)
    home = life.ledger.sequences[request.sequence].home
    life.command(Begin(home, request.sequence, begins, tokens))


# Which go


def make_room(life: MachineState, home: str) -> None:
    """Drop snapshots for which a home has no free place, the least recently used first."""
    recent = life.snapshots.recent[home]
    while len(recent) > _room(life, home):
        number, tokens = next(iter(recent))
        life.snapshots.remove(number, tokens)
        _keep_rest(life, home, number)


def drop_later(life: MachineState, number: int, beyond: int) -> None:
    """A sequence now ends after ``beyond`` tokens: its home drops later snapshots."""
    home = life.snapshots.homes.get(number)
    gone = [tokens for tokens in life.snapshots.of.get(number, ()) if tokens > beyond]
    for tokens in gone:
        life.snapshots.remove(number, tokens)
    if home is not None and gone:
        _keep_rest(life, home, number)


def keep_only_snapshots(life: MachineState, number: int, home: str, beyond: int) -> None:
    """A sequence is not continued: its home keeps only its snapshots after at most ``beyond`` tokens."""
    drop_later(life, number, beyond)
    if life.ledger.has_states:
        _keep_rest(life, home, number, ended=True)


def drop(life: MachineState, number: int) -> list[str]:
    """Let a home drop all state of a sequence; returns the home if it is alive."""
    home = life.snapshots.homes.get(number)
    for tokens in list(life.snapshots.of.get(number, ())):
        life.snapshots.remove(number, tokens)
    return [home] if home in life.ledger.workers else []


def worker_lost(life: MachineState, worker: str) -> None:
    """A worker is gone, with all snapshots there."""
    for number in [number for number, home in life.snapshots.homes.items() if home == worker]:
        drop(life, number)


def _keep_rest(life: MachineState, home: str, number: int, ended: bool = False) -> None:
    if home in life.ledger.workers:
        life.command(Keep(home, number, tuple(sorted(life.snapshots.of.get(number, ()))), ended))


def _room(life: MachineState, home: str) -> int:
    """Places of a home that no sequence has."""
    account = life.ledger.workers[home]
    return max(0, account.places - account.homed)
