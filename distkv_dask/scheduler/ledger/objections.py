"""Why a move of blocks cannot start."""

from __future__ import annotations

from distkv_dask.placement import Move
from distkv_dask.scheduler.ledger.accounts import SequenceAccount, WorkerAccount
from distkv_dask.scheduler.ledger.placements import blocks_of, span_around


def objection(move: Move, account: SequenceAccount, target: WorkerAccount, block_tokens: int) -> str:
    """Why a move of a sequence's blocks to a target cannot start now; empty when it can."""
    if account.sharers:
        return "others share the sequence's blocks"
    around = span_around(account.placement, move, block_tokens)
    if around is None or move.source in account.lost or move.source == move.target:
        return "the source does not hold these tokens in whole blocks of one span"
    if any(move.start < other.stop and other.start < move.stop for other in account.moves):
        return "some of these tokens are being moved already"
    if move.target in account.lost:
        return "the sequence lost blocks on an earlier worker of the target's name"
    need = blocks_of(move.tokens, block_tokens)
    if target.retiring or target.free < need:
        return f"the target has {target.free} free blocks or is being drained"
    if move.target != account.home and move.stop < account.stop:
        return "" if target.lendable >= need else "the target lends no more"
    if move.stop == account.stop and not target.can_decode:
        return "the tail goes with its home, and the target has no weights"
    return ""
