"""Chunks of several prompts computed together, and the result of each: scores, a choice, a token, pooled states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, cast

import torch

from distkv_dask.errors import DistKVError
from distkv_dask.gang import ChunkResult, PrefillChunk
from distkv_dask.logprobs import TokenLogprob
from distkv_dask.worker.home.choosing import Choosing, rounds
from distkv_dask.worker.home.home_state import HomeState
from distkv_dask.worker.home.pooling import Pooling
from distkv_dask.worker.home.prefill import begun, ended
from distkv_dask.worker.model.logprobs import Drawn, draw_batch
from distkv_dask.worker.model.sampling import Draw

if TYPE_CHECKING:
    from distkv_dask.worker.model.loaded import LoadedModel
    from distkv_dask.worker.model.recurrent import Past


class Run(Protocol):
    """Computes chunks, such as :class:`~distkv_dask.worker.home.prefill.PrefillRun`."""

    scored: list[list[TokenLogprob]]
    pooling: Pooling

    def run(self, chunks: Sequence[PrefillChunk], past: Past | None) -> torch.Tensor:
        """Compute chunks; logits, float32 [n, vocabulary], of the last token of each from which one is drawn."""


Computed = tuple[torch.Tensor, list[list[TokenLogprob]]]
"""Logits from which tokens are drawn, and what was scored in each chunk."""


class Chunks:
    """Chunks that one forward computes: each is in one span, unless there is only one chunk.

    Parameters
    ----------
    model
        The weights.
    chunks
        In the order of the results.

    Raises
    ------
    InvalidRequestError
        Choices cannot be distinguished.
    """

    def __init__(self, model: LoadedModel, chunks: Sequence[PrefillChunk]) -> None:
        self._model = model
        self._choosing = {at: Choosing(chunk, model.eos_token_ids) for at, chunk in enumerate(chunks) if chunk.choices}
        self._chunks = [self._choosing[at].chunk if at in self._choosing else chunk for at, chunk in enumerate(chunks)]
        self._logits = torch.empty(0, 0)
        self._scored: list[list[TokenLogprob]] = []
        self._pooling = Pooling(chunks)

    def compute(self, run: Run, kept: HomeState) -> None:
        """Compute the chunks, and then the choices after them, which the home does not keep.

        Parameters
        ----------
        run
            Computes chunks in the gang that is running.
        kept
            The home's states of the sequences.
        """
        self._logits, self._scored = self._forward(run, kept, self._chunks, keeps=True)
        self._pooling = run.pooling
        for at, one in self._choosing.items():
            one.take_prompt_scores(self._scored[at])
        for batch in rounds([*self._choosing.values()]):
            _, scored = self._forward(run, kept, [chunk for _, chunk in batch], keeps=False)
            for (one, chunk), some in zip(batch, scored, strict=True):
                one.learn(chunk.tokens, some)

    def results(self) -> list[ChunkResult]:
        """The result of each chunk, after :meth:`compute`.

        Raises
        ------
        DistKVError
            A first token, or a choice, cannot be drawn, or hidden states are not finite.
        """
        first, pooled, results = iter(self._first_tokens()), self._pooling.results(), []
        for at, chunk in enumerate(self._chunks):
            if at in self._choosing:
                results.append(self._choosing[at].result())
            else:
                token, logprob = next(first) if chunk.sampling else (None, None)
                results.append(ChunkResult(token, logprob, tuple(self._scored[at]), pooled=pooled[at]))
        return results

    def _forward(self, run: Run, kept: HomeState, chunks: Sequence[PrefillChunk], *, keeps: bool) -> Computed:
        with kept.change(self._model, begun(chunks)) as change:
            logits = run.run(chunks, change.past)
            if keeps:
                change.after = ended(chunks, change.past)
        return logits, run.scored

    def _first_tokens(self) -> list[Drawn]:
        draws = [
            Draw(chunk.sampling, chunk.stop, chunk.history, self._model.follower(chunk.sampling))
            for chunk in self._chunks
            if chunk.sampling is not None and not chunk.choices
        ]
        drawn = draw_batch(self._logits, draws, self._model.device)
        for result in drawn:
            if isinstance(result, DistKVError):
                raise result
        return cast(list[Drawn], drawn)
