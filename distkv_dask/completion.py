"""The answer to a prompt, with its timings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from distkv_dask import svg
from distkv_dask.logprobs import TokenLogprob
from distkv_dask.placement import Placement
from distkv_dask.quotes import Quote
from distkv_dask.sampling import FinishReason

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds a request spent waiting for room, in prefill (to its first token), and in decode.

    If a worker was lost, the interrupted phase lasts until the KV cache is recomputed. ``proposed_tokens`` were tried
    in decode steps before they were drawn, and ``accepted_tokens`` of them were drawn then: each saved a step
    (``distkv.speculation``).
    """

    queued: float = 0.0
    prefill: float = 0.0
    decode: float = 0.0
    proposed_tokens: int = 0
    accepted_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Completion:
    """The answer to one prompt.

    ``token_ids`` are the generated ids, without the end-of-sequence token. ``placement`` says where the sequence's KV
    was. ``error`` is the error's text if ``finish_reason`` is ``"error"``. ``reused_tokens`` counts prompt tokens that
    were not computed: their KV came from a document, or from an earlier request that began alike.

    ``logprobs`` are those of ``token_ids``, and ``prompt_logprobs`` those of the prompt's tokens, None for its first;
    both are None if they were not requested (``SamplingParams(logprobs=..., prompt_logprobs=...)``).
    ``engine.tokenizer.decode([token_id], special=True)`` is the text of one. ``scores`` has the probability of each of
    ``SamplingParams(choices=...)`` among all of them. ``quote`` is where the answer quotes its document
    (``SamplingParams(quotes=...)``). ``others`` are the other answers of ``SamplingParams(n=...)``. ``embedding`` is
    float32 [hidden size], of ``SamplingParams(embed=...)``; completions are compared without it.
    """

    text: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    finish_reason: FinishReason
    error: str | None = None
    timings: Timings = field(default_factory=Timings)
    placement: Placement = ()
    reused_tokens: int = 0
    logprobs: tuple[TokenLogprob, ...] | None = None
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    scores: Mapping[str | tuple[int, ...], float] | None = None
    quote: Quote | None = None
    others: tuple[Completion, ...] = ()
    embedding: NDArray[np.float32] | None = field(default=None, compare=False)

    @property
    def answers(self) -> tuple[Completion, ...]:
        """All answers to the prompt, this one first."""
        return (self, *self.others)

    def _repr_html_(self) -> str:
        """What notebooks show: the answer, its times, and a picture of where the KV was."""
        times = self.timings
        reused = f" ({self.reused_tokens:,} reused, faint below)" if self.reused_tokens else ""
        return svg.card(
            f"Completion: {self.finish_reason}",
            svg.text(self.text if self.error is None else self.error),
            f"{self.prompt_tokens:,} prompt tokens{reused}, {len(self.token_ids):,} new ones; "
            f"{times.queued:.2f} s in the queue, {times.prefill:.2f} s of prefill, {times.decode:.2f} s of decode",
            svg.spans([svg.Piece(s.worker, s.start, s.stop, s.document is not None) for s in self.placement]),
        )
