"""The answer to a prompt, and what it took."""

from __future__ import annotations

from dataclasses import dataclass, field

from distkv_dask import svg
from distkv_dask.placement import Placement
from distkv_dask.sampling import FinishReason


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds a request spent waiting for room, in prefill (to its first token), and in decode.

    Where a worker was lost, the one that was interrupted goes on until the KV cache is recomputed.
    """

    queued: float = 0.0
    prefill: float = 0.0
    decode: float = 0.0


@dataclass(frozen=True, slots=True)
class Completion:
    """The answer to one prompt.

    ``token_ids`` are the generated ids (without the end-of-sequence token that ended them), ``placement`` says where
    the sequence's KV lay, ``error`` is the error's text when ``finish_reason`` is ``"error"``. ``reused_tokens`` of the
    prompt were not computed: their KV was a document's, or still there from a request that began alike.
    """

    text: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    finish_reason: FinishReason
    error: str | None = None
    timings: Timings = field(default_factory=Timings)
    placement: Placement = ()
    reused_tokens: int = 0

    def _repr_html_(self) -> str:
        """What notebooks show: the answer, its times, and a picture of where the KV lay."""
        times = self.timings
        reused = f" ({self.reused_tokens:,} reused, faint below)" if self.reused_tokens else ""
        return svg.card(
            f"Completion: {self.finish_reason}",
            svg.text(self.text if self.error is None else self.error),
            f"{self.prompt_tokens:,} prompt tokens{reused}, {len(self.token_ids):,} new ones; "
            f"{times.queued:.2f} s in the queue, {times.prefill:.2f} s of prefill, {times.decode:.2f} s of decode",
            svg.spans([svg.Piece(s.worker, s.start, s.stop, s.document is not None) for s in self.placement]),
        )
