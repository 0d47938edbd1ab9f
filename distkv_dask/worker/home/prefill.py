"""Chunks of prompts: several in one forward; one in several forwards if its tail continues in another span."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

import torch

from distkv_dask.gang import Exchanged, PrefillChunk
from distkv_dask.logprobs import TokenLogprob
from distkv_dask.worker.by_layer.paused import PausedForward
from distkv_dask.worker.home.attention import DistAttention
from distkv_dask.worker.home.decode import Attention
from distkv_dask.worker.home.gang import HomeGang
from distkv_dask.worker.home.home_state import Begun, Ended
from distkv_dask.worker.home.pooling import Pooling
from distkv_dask.worker.model.logprobs import token_logprobs
from distkv_dask.worker.model.lora import adapted_rows, adapting
from distkv_dask.worker.plan import Part, Stored, tail_of
from distkv_dask.worker.showing import Showing

if TYPE_CHECKING:
    from distkv_dask.worker.model.loaded import LoadedModel
    from distkv_dask.worker.model.lora import PlacedAdapter
    from distkv_dask.worker.model.recurrent import Past


class PrefillRun:
    """Computes chunks.

    Parameters
    ----------
    gang
        The running gang.
    model
        The weights.
    attention
        Makes the attention of a step from its parts by worker, the sequences, and its number.
    cutting
        Cuts sequences into parts by worker, as :func:`distkv_dask.worker.plan.cut`.
    """

    def __init__(
        self,
        gang: HomeGang | PausedForward,
        model: LoadedModel,
        attention: Callable[[Mapping[str, Part], Sequence[Stored], int], Attention],
        cutting: Callable[[Sequence[Stored]], dict[str, Part]],
    ) -> None:
        self._gang = gang
        self._model = model
        self._new_attention = attention
        self._cutting = cutting
        self.exchanged = Exchanged()
        """What was exchanged with holders so far."""
        self.scored: list[list[TokenLogprob]] = []
        """Log probabilities of the last chunks' targets, chunk by chunk."""
        self.pooling = Pooling(())
        """Sums of the last chunks' hidden states."""
        self.showing: Showing | None = None
        """Tells the holder lane how far the chunks are."""
        self._chunks: Sequence[PrefillChunk] = ()
        self._adapters: list[PlacedAdapter | None] = []
        self._parts: dict[str, Part] = {}
        self._step = 0

    def run(self, chunks: Sequence[PrefillChunk], past: Past | None) -> torch.Tensor:
        """Compute chunks; logits, float32 [n, vocabulary], of the last token of each from which one is drawn.

        Parameters
        ----------
        chunks
            A chunk, or several that are in one span each and need no holders but the gang's.
        past
            States of the chunks' sequences, if the model has recurrent layers.
        """
        self._chunks, self.scored, self.pooling = chunks, [[] for _ in chunks], Pooling(chunks)
        self._adapters = [self._model.adapter(chunk.adapter) for chunk in chunks]
        positions, logits = [chunk.start for chunk in chunks], torch.empty(0, 0)
        while counts := self._counts(positions, past):
            batch = [
                Stored(chunk.sequence, chunk.placement, at, count)
                for chunk, at, count in zip(self._chunks, positions, counts, strict=True)
            ]
            old, self._parts = self._parts, self._cutting(batch)
            if self._step == 0:
                self._gang.open_sessions(self._parts)
            else:
                self._gang.change(self._step, old, self._parts)
            attention = self._new_attention(self._parts, batch, self._step)
            positions = [at + count for at, count in zip(positions, counts, strict=True)]
            if isinstance(attention, DistAttention) and positions == [chunk.stop for chunk in chunks]:
                attention.showing = self.showing
            try:
                logits = self._score(batch, self._forward(batch, attention, past))
            finally:
                self.exchanged += attention.exchanged
                attention.close()
            self._step += 1
        return logits

    def _counts(self, positions: Sequence[int], past: Past | None) -> list[int]:
        """How many tokens of each chunk the next step computes; nothing if all are."""
        ends = [
            min(chunk.stop, tail_of(chunk.sequence, chunk.placement, at).stop)
            for chunk, at in zip(self._chunks, positions, strict=True)
            if at < chunk.stop
        ]
        if ends and past is not None and not past.is_empty and self._model.geometry.scan_once:
            return [1]
        return [end - at for end, at in zip(ends, positions, strict=False)]

    def _forward(self, batch: Sequence[Stored], attention: Attention, past: Past | None) -> torch.Tensor:
        put, ends = self._model.device.put, [one.length + one.queries for one in batch]
        positions = [at for one, end in zip(batch, ends, strict=True) for at in range(one.length, end)]
        tokens = [
            token
            for chunk, one, end in zip(self._chunks, batch, ends, strict=True)
            for token in chunk.tokens[one.length - chunk.start : end - chunk.start]
        ]
        firsts = accumulate((one.queries for one in batch), initial=0)
        kept = [
            first + at
            for chunk, one, first in zip(self._chunks, batch, firsts, strict=False)
            for at in _kept(chunk, one)
        ]
        inputs, keep = put(torch.tensor((tokens, positions))), put(torch.tensor(kept, dtype=torch.int64))
        counts = [one.queries for one in batch]
        with adapting(adapted_rows([*zip(self._adapters, counts, strict=False)])):
            return self._model.forward(inputs[0], inputs[1], attention, keep, past, self.pooling.step(batch))

    def _score(self, batch: Sequence[Stored], logits: torch.Tensor) -> torch.Tensor:
        """Score the targets of a step, and return the logits that tokens are drawn from."""
        drawing, at = list[int](), 0
        for chunk, one, scored in zip(self._chunks, batch, self.scored, strict=True):
            kept, targets = _kept(chunk, one), _targets(chunk, one)
            stop, some = at + len(kept), [targets[row] for row in kept if row < len(targets)]
            scored += token_logprobs(logits[at : at + len(some)], some, chunk.best, self._model.device)
            if _draws(chunk, one):
                drawing.append(stop - 1)
            at = stop
        if len(drawing) == len(logits):
            return logits
        return logits[self._model.device.put(torch.tensor(drawing, dtype=torch.int64))]


def begun(chunks: Sequence[PrefillChunk]) -> Iterator[Begun]:
    """The sequences of chunks, before they are computed."""
    for chunk in chunks:
        yield Begun(chunk.sequence, chunk.start, chunk.stop)


def ended(chunks: Sequence[PrefillChunk], past: Past | None) -> Iterator[Ended]:
    """The sequences of chunks, once they are computed."""
    for row, chunk in enumerate(chunks):
        yield Ended(chunk.sequence, chunk.stop, None if past is None else past.state(row), chunk.snapshot)


def _targets(chunk: PrefillChunk, step: Stored) -> tuple[tuple[int, ...], ...]:
    """The chunk's targets after the tokens that a step computes."""
    first = step.length - chunk.start
    return chunk.targets[first : first + step.queries]


def _draws(chunk: PrefillChunk, step: Stored) -> bool:
    """Whether a token is drawn after a step."""
    return chunk.sampling is not None and not chunk.choices and step.length + step.queries == chunk.stop


def _kept(chunk: PrefillChunk, step: Stored) -> list[int]:
    """Indices of a step's tokens whose logits are needed."""
    kept, last = [at for at, some in enumerate(_targets(chunk, step)) if some], step.queries - 1
    return [*kept, last] if _draws(chunk, step) and last not in kept else kept
