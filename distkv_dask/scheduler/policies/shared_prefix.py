"""Placement of documents and of questions on them; shared blocks stay where they are. Pure."""

from __future__ import annotations

from array import array
from collections import Counter
from dataclasses import replace

from distkv_dask.placement import Placement, Span
from distkv_dask.scheduler.ledger.ledger import Ledger
from distkv_dask.scheduler.ledger.placements import clipped, shared, shifted
from distkv_dask.scheduler.policies.base import Ask, Policy

HEADROOM = 512
"""Additional tokens for which a document's home should have room, so that questions can decode there."""


def place(ledger: Ledger, policy: Policy, ask: Ask, ahead: Ask | None = None) -> Placement | None:
    """Choose the placement of a document, a question on one, or any other request; None while there is no room."""
    if ask.document is not None and not ask.tokens:
        return shared(ledger.sequences[ask.document].placement, ask.document, ask.shared)
    if ask.document is not None:
        own = _near(ledger, ask) if ahead is None or ask.home else None
        if not ask.home:
            own = own or policy.place(ledger, ask, ahead)
        return None if own is None else shared(
            ledger.sequences[ask.document].placement, ask.document, ask.shared
        ) + shifted(own, ask.shared)  # fmt: skip
    if ask.is_document:
        roomy = policy.place(ledger, replace(ask, tokens=ask.tokens + HEADROOM), ahead)
        kept = tuple(clipped(roomy or (), 0, ask.tokens))
        if kept and ledger.workers[kept[-1].worker].can_decode:
            return kept
    return policy.place(ledger, ask, ahead)


def _near(ledger: Ledger, ask: Ask) -> Placement | None:
    """All of a question's own tokens on one worker: where others on the document decode, or where the document ends.

    Questions of one home decode in the same steps, which read the document's blocks once for all of them.
    """
    assert ask.document is not None
    account = ledger.sequences[ask.document]
    others = Counter(ledger.sequences[n].home for n in account.sharers if not ledger.sequences[n].idle)
    need = ledger.blocks(ask.tokens)
    near = [ask.home] if ask.home else [*(name for name, _ in others.most_common()), account.home]
    for name in dict.fromkeys(near):
        worker = ledger.workers.get(name)
        if worker is None or not worker.can_decode or worker.retiring:
            continue
        if worker.free >= need and worker.has_place:
            return (Span(name, 0, ask.tokens),)
    return None


def common_tokens(one: array[int], other: array[int], block_tokens: int) -> int:
    """Tokens of the common prefix in whole blocks.

    Examples
    --------
    >>> common_tokens(array("i", [1, 2, 3, 4, 5]), array("i", [1, 2, 3, 4, 6]), 2)
    4
    """
    low, high = 0, min(len(one), len(other)) // block_tokens
    while low < high:  # the number of equal blocks is between
        middle = (low + high + 1) // 2
        if one[low * block_tokens : middle * block_tokens] == other[low * block_tokens : middle * block_tokens]:
            low = middle
        else:
            high = middle - 1
    return low * block_tokens
