"""Several answers to one prompt: requests that share the prompt's KV as questions share a document's."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence
from concurrent.futures import InvalidStateError
from contextlib import suppress
from dataclasses import replace
from math import fsum, inf

from distkv_dask.client.session.generation import Generation
from distkv_dask.completion import Completion
from distkv_dask.sampling import SamplingParams


def branch_samplings(sampling: SamplingParams) -> list[SamplingParams]:
    """Sampling parameters of each branch, with its own seed, which depends only on the request's.

    Parameters
    ----------
    sampling
        The request's, with a seed.
    """
    width = sampling.best_of or sampling.n
    ranked = 0 if width > sampling.n and sampling.logprobs is None else sampling.logprobs
    one = replace(sampling, n=1, best_of=None, logprobs=ranked)
    others = replace(one, prompt_logprobs=None)
    return [one, *(replace(others, seed=_seed(sampling.seed, at)) for at in range(1, width))]


def _seed(seed: int | None, branch: int) -> int:
    digest = hashlib.blake2b(f"{seed}/{branch}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 2


def joined(branches: Sequence[Generation], sampling: SamplingParams, reused: int | None) -> Generation:
    """The request's future: it is done when all branches are, and fails when one does, which cancels the others.

    Parameters
    ----------
    branches
        Under way.
    sampling
        The request's.
    reused
        Prompt tokens that were not computed for any branch; None: as the first one says.
    """

    def cancel() -> None:
        for one in branches:
            one.cancel()

    whole, lock, left = Generation(cancel), threading.Lock(), len(branches)

    def ended(one: Generation) -> None:
        nonlocal left
        with lock:
            left -= 1
            last = not left
        if one.cancelled():
            whole.cancel()
        elif (error := one.exception()) is not None:
            whole.timings = one.timings
            with suppress(InvalidStateError):  # another one failed before, or it was cancelled
                whole.set_exception(error)
            cancel()
        elif last:
            with suppress(InvalidStateError):
                whole.set_result(_answer([branch.result() for branch in branches], sampling, reused))

    for one in branches:
        one.add_done_callback(ended)  # type: ignore[arg-type]  # it is called with this very future
    return whole


def _answer(done: Sequence[Completion], sampling: SamplingParams, reused: int | None) -> Completion:
    """The first answer, which has the others; the best ones if more were drawn than requested."""
    scored = done[0].prompt_logprobs
    chosen = sorted(done, key=_mean_logprob, reverse=True)[: sampling.n] if len(done) > sampling.n else done
    if sampling.logprobs is None:
        chosen = [replace(one, logprobs=None) for one in chosen]
    first, *others = (replace(one, prompt_logprobs=None) for one in chosen)
    counted = first.reused_tokens if reused is None else reused
    return replace(first, others=tuple(others), prompt_logprobs=scored, reused_tokens=counted)


def _mean_logprob(done: Completion) -> float:
    logprobs = [one.logprob for one in done.logprobs or ()]
    return fsum(logprobs) / len(logprobs) if logprobs else -inf
