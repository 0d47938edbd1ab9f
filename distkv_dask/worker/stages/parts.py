"""Chunks and decode windows in parts that go through the stages one behind the other, so that all stages compute."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain, islice
from typing import TYPE_CHECKING

import torch

from distkv_dask.gang import DecodeWindow, Exchanged, PrefillChunk, SequenceState, WindowResult
from distkv_dask.logprobs import TokenLogprob
from distkv_dask.worker.home.decode import DecodeLoop, Speculator
from distkv_dask.worker.home.home_state import Ended
from distkv_dask.worker.home.pooling import Pooling
from distkv_dask.worker.home.prefill import PrefillRun
from distkv_dask.worker.stages.links import StageLinks

if TYPE_CHECKING:
    from distkv_dask.worker.model.recurrent import Past

LEAST_TOKENS = 64
"""Fewest tokens of a part of a chunk: with fewer, each token takes a stage longer."""

LEAST_SEQUENCES = 4
"""Fewest sequences in a part of a decode step, which takes as long for one as for a few."""


class PrefillInParts:
    """Computes chunks as :class:`~distkv_dask.worker.home.prefill.PrefillRun` does, in parts.

    Parameters
    ----------
    links
        To the stages.
    new_run
        Makes what computes a part.
    """

    def __init__(self, links: StageLinks, new_run: Callable[[], PrefillRun]) -> None:
        self._links = links
        self._new_run = new_run
        self.exchanged = Exchanged()
        """What was exchanged with stages so far."""
        self.scored: list[list[TokenLogprob]] = []
        """Log probabilities of the last chunks' targets, chunk by chunk."""
        self.pooling = Pooling(())
        """Sums of the last chunks' hidden states."""

    def run(self, chunks: Sequence[PrefillChunk], past: Past | None) -> torch.Tensor:
        """Compute chunks; logits, float32 [n, vocabulary], of the last token of each from which one is drawn."""
        most = most_tokens(sum(len(chunk.tokens) for chunk in chunks), self._links.count)
        pieces = [pieces_of(chunk, most) for chunk in chunks]
        parts = together([*chain.from_iterable(pieces)], most)
        runs = [self._new_run() for _ in parts]
        calls = [partial(run.run, part, None) for run, part in zip(runs, parts, strict=True)]
        logits = self._links.abreast.run(calls, self._links.break_off)
        self.exchanged = sum((run.exchanged for run in runs), self.exchanged)
        scored = chain.from_iterable(run.scored for run in runs)
        self.scored = [[*chain.from_iterable(islice(scored, len(some)))] for some in pieces]
        self.pooling = Pooling(chunks)
        for run in runs:
            self.pooling.add(run.pooling)
        return torch.cat(logits)


def most_tokens(tokens: int, count: int) -> int:
    """Most tokens of a part of chunks that go through ``count`` stages: twice as many parts, if not too short.

    Examples
    --------
    >>> most_tokens(512, 1), most_tokens(512, 2), most_tokens(512, 8), most_tokens(50, 2)
    (512, 128, 64, 64)
    """
    return tokens if count == 1 else max(LEAST_TOKENS, -(-tokens // (2 * count)))


def pieces_of(chunk: PrefillChunk, most: int) -> list[PrefillChunk]:
    """A chunk as chunks of at most so many tokens, of which only the last one draws a token."""
    pieces, size = list[PrefillChunk](), len(chunk.tokens)
    for first in range(0, size, most):
        some = slice(first, first + most)
        sampling = chunk.sampling if first + most >= size else None
        tokens, targets = chunk.tokens[some], chunk.targets[some]
        pieces.append(replace(chunk, start=chunk.start + first, tokens=tokens, targets=targets, sampling=sampling))
    return pieces


def together(pieces: Sequence[PrefillChunk], most: int) -> list[list[PrefillChunk]]:
    """Pieces of several sequences in parts of at most so many tokens, in order; a part has one piece of a sequence."""
    parts, room = list[list[PrefillChunk]](), 0
    for piece in pieces:
        if not parts or len(piece.tokens) > room or parts[-1][-1].sequence == piece.sequence:
            parts.append([])
            room = most
        parts[-1].append(piece)
        room -= len(piece.tokens)
    return parts


class DecodeInParts:
    """Runs a window as :class:`~distkv_dask.worker.home.decode.DecodeLoop` does, its batch in parts.

    Each part runs its own steps. One that is small is not cut, and only such a one tries proposed tokens.

    Parameters
    ----------
    links
        To the stages.
    new_loop
        Makes what runs the window over a part of the batch.
    batch
        The sequences.
    """

    def __init__(
        self,
        links: StageLinks,
        new_loop: Callable[[Sequence[SequenceState]], DecodeLoop],
        batch: Sequence[SequenceState],
    ) -> None:
        self._links = links
        count = max(1, min(links.count, len(batch) // LEAST_SEQUENCES))
        self._loops = [new_loop(batch[at::count]) for at in range(count)]

    def run(self, window: DecodeWindow, past: Past | None = None, speculator: Speculator | None = None) -> WindowResult:
        """Run steps until the window is over or all sequences have stopped."""
        tries = speculator if len(self._loops) == 1 else None
        calls = [partial(loop.run, window, None, tries) for loop in self._loops]
        return _joined(self._links.abreast.run(calls, self._links.break_off))

    def ended(self) -> Iterator[Ended]:
        """The sequences that have not stopped, after the window."""
        return chain.from_iterable(loop.ended() for loop in self._loops)


def _joined(parts: Sequence[WindowResult]) -> WindowResult:
    """The results of parts of a batch as one."""
    if len(parts) == 1:
        return parts[0]
    joined = WindowResult({}, {}, max(one.steps for one in parts), max(one.seconds for one in parts))
    for one in parts:
        for name in ("tokens", "finished", "errors", "logprobs"):
            getattr(joined, name).update(getattr(one, name))
    return replace(joined, exchanged=sum((one.exchanged for one in parts), Exchanged()))
