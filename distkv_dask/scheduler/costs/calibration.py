"""How much slower a worker is now than when it was timed, measured with every decode window.

A machine is timed when the first engine opens on it, perhaps weeks ago, because timings are kept. Its other load
changes within seconds. Pure.
"""

from __future__ import annotations

import math
from dataclasses import replace

from distkv_dask.gang import WindowResult
from distkv_dask.scheduler.costs.model import Curve, PerformanceModel
from distkv_dask.scheduler.ledger.ledger import Ledger

SECONDS = 2.0
"""Seconds of decoding after which earlier measurements have a weight of 1 / e."""
MOST = 3.0
"""Bound of the factor: a worker that seems slow gets less work, and so is measured less."""


class Calibration:
    """Calibrates a fitted model with the windows of an engine's homes.

    Only timed workers are calibrated: a preset says how workers compare, not how fast they are.

    Parameters
    ----------
    ledger
        The engine's ledger.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._fitted: PerformanceModel | None = None
        self._curves: dict[str, Curve] = {}
        self._slower: dict[str, float] = {}

    def follow(self, model: PerformanceModel) -> PerformanceModel:
        """The same model, with curves of workers that change with every window from now on."""
        self._fitted = model
        self._curves = {worker: _scaled(curve, self.slower(worker)) for worker, curve in model.curves.items()}
        return replace(model, curves=self._curves)

    def slower(self, worker: str) -> float:
        """How many times slower a worker is than when it was timed; 1 if unknown."""
        return self._slower.get(worker, 1.0)

    def expected(self, home: str, result: WindowResult) -> float:
        """Seconds of a step of a window, by the model as fitted; 0 if unknown."""
        if not result.steps or self._fitted is None or home not in self._fitted.curves:
            return 0.0
        rows = tokens = 0.0
        remote: dict[str, tuple[float, float]] = {}
        read: set[tuple[int, int]] = set()
        for sequence, new in result.tokens.items():
            account = self._ledger.sequences.get(sequence)
            if account is None:
                continue
            proposed, accepted = result.speculated.get(sequence, (0, 0))
            part = (len(new) - accepted) / result.steps
            rows += part + proposed / result.steps
            length = account.length + len(new) / 2
            for span in account.placement:
                if span.start >= length:
                    break
                if span.document is not None:  # read once for all that share it
                    if (span.document, span.start) in read:
                        continue
                    read.add((span.document, span.start))
                held = part * (min(span.stop, length) - span.start)
                if span.worker == home:
                    tokens += held
                else:
                    there, more = remote.get(span.worker, (0.0, 0.0))
                    remote[span.worker] = there + part, more + held
        if not rows:
            return 0.0
        ends = {worker: account.endpoint for worker, account in self._ledger.workers.items() if worker in remote}
        here = self._ledger.workers.get(home)
        links = {} if here is None else {one: self._fitted.link(here.endpoint, end) for one, end in ends.items()}
        return self._fitted.step(home, rows, tokens, remote, links)

    def observe(self, home: str, result: WindowResult) -> None:
        """A home finished a window; to be called before the ledger is updated."""
        expected = self.expected(home, result)
        if not expected or self._fitted is None:
            return
        ratio = min(MOST, max(1 / MOST, result.seconds / result.steps / expected))
        before = math.exp(-result.seconds / SECONDS)
        self._slower[home] = self.slower(home) ** before * ratio ** (1 - before)
        self._curves[home] = _scaled(self._fitted.curves[home], self._slower[home])

    def forget_worker(self, worker: str) -> None:
        """A worker is gone."""
        self._slower.pop(worker, None)


def _scaled(curve: Curve, times: float) -> Curve:
    return Curve(curve.step * times, curve.row * times, curve.token * times, curve.prompt * times, curve.pair * times)
