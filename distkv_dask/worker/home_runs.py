"""Makes what computes a gang at its home: traced if that is asked, in parts if other workers have layers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from distkv_dask.gang import SequenceState
from distkv_dask.worker.by_layer.paused import PausedForward
from distkv_dask.worker.home.decode import DecodeLoop
from distkv_dask.worker.home.gang import HomeGang
from distkv_dask.worker.home.prefill import PrefillRun
from distkv_dask.worker.home.step_attention import StepAttention
from distkv_dask.worker.home.traced import TracedDecodeLoop
from distkv_dask.worker.showing import Showing
from distkv_dask.worker.stages.parts import DecodeInParts, PrefillInParts
from distkv_dask.worker.trace import Ring

if TYPE_CHECKING:
    from distkv_dask.worker.model.loaded import LoadedModel


class HomeRuns:
    """Makes what computes one gang after the other.

    Parameters
    ----------
    steps
        Makes the attention of steps, and knows the links to further stages.
    ring
        Where a trace records; None without one.
    """

    def __init__(self, steps: StepAttention, ring: Ring | None) -> None:
        self._steps = steps
        self._ring = ring

    def prefill(
        self, gang: HomeGang | PausedForward, model: LoadedModel, showing: Showing
    ) -> PrefillRun | PrefillInParts:
        """What computes chunks."""
        steps = self._steps
        new_run = partial(PrefillRun, gang, model, partial(steps.attention, gang), steps.cut)
        if steps.links is not None:
            return PrefillInParts(steps.links, new_run)
        run = new_run()
        run.showing = showing
        return run

    def decode(
        self, gang: HomeGang | PausedForward, model: LoadedModel, batch: Sequence[SequenceState]
    ) -> DecodeLoop | DecodeInParts:
        """What runs a window over a batch."""
        planning: tuple[Any, ...] = partial(self._steps.attention, gang), self._steps.cut
        if self._steps.links is not None:
            return DecodeInParts(self._steps.links, lambda some: DecodeLoop(gang, model, some, *planning), batch)
        loop = gang, model, batch, *planning
        return DecodeLoop(*loop) if self._ring is None else TracedDecodeLoop(self._ring, *loop)
