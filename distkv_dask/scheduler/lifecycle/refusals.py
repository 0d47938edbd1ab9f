"""Errors of refused requests: what they needed, what is available, and what to do."""

from __future__ import annotations

from distkv_dask.errors import CapacityError, DistKVError, WorkerLostError
from distkv_dask.scheduler.ledger.ledger import Ledger
from distkv_dask.scheduler.policies.base import Policy
from distkv_dask.scheduler.records.request import Request


def too_large(request: Request, ledger: Ledger, policy: Policy, block_bytes: int) -> DistKVError:
    """The error of a request that is larger than all workers' memory."""
    need, have = ledger.blocks(request.tokens), policy.limit(ledger)
    lost = ""
    if request.lost:
        lost = f" It lost blocks with worker {request.lost[-1]}, which died or left, and no replacement came in time."
    if any(account.retiring for account in ledger.workers.values()):
        lost += (
            " Workers that are being retired do not count, nor do those that Dask paused for their memory: give them a "
            "larger memory limit, or lower kv_memory and add workers."
        )
    what = f"a prompt of {len(request.prompt)} tokens with max_new_tokens={request.asked.sampling.max_new_tokens}"
    shorter = ", or lower max_new_tokens" if request.asked.sampling.embed is None else ", or shorten the text"
    if request.asked.sampling.embed is not None:
        what = f"the embedding of a text of {len(request.prompt)} tokens"
    if request.is_document:
        what = f"a document of {len(request.prompt)} tokens"
    return CapacityError(
        f"{what} needs {need * block_bytes} bytes of KV memory; the {len(ledger.workers)} workers of the engine have "
        f"{have * block_bytes} bytes for one request (distkv.policy: {policy.name}). Raise kv_memory "
        f"(distkv.kv-memory, per worker), add workers{shorter}.{lost}"
    )


def waited_in_vain(request: Request, reason: str, limit: float) -> DistKVError:
    """The error of a request that was set aside for too long for a reason other than its size."""
    what = "the document" if request.is_document else "the request"
    return CapacityError(
        f"{what} was set aside for more than {limit:g} s (distkv.timeouts.open): {reason}. Submit it again "
        f"once that is over, or add workers; engine.status() says what they hold."
    )


def workers_lost(request: Request) -> DistKVError:
    """The error of a request that lost blocks and is not recomputed."""
    if request.is_save:
        return WorkerLostError(
            f"worker {request.lost[-1]}, which held part of the document, died or left while it was saved: save it "
            f"again; the document is recomputed for that"
        )
    return WorkerLostError(
        f"{len(request.lost)} workers died or left while they held part of the request's KV cache, the last was "
        f"{request.lost[-1]}. The request was not finished: submit it again. If the workers ran out of memory, lower "
        f"kv_memory."
    )
