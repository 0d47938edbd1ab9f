"""First visible position of each query in a worker's KV, in layers with windows or chunks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch

from distkv_dask.geometry import LayerKind
from distkv_dask.worker.channels.bodies import Row


class FirstKeys:
    """First visible tokens of the queries of some rows, by kind of layer, step after step.

    A worker holds some ranges of a sequence, and its kernel counts tokens without the gaps, so positions are converted
    to indices into these ranges.

    Parameters
    ----------
    rows
        The rows, with their positions.
    kinds
        Kinds of layers; those that see everything are skipped.
    """

    def __init__(self, rows: Sequence[Row], kinds: Iterable[LayerKind]) -> None:
        each = [row.queries // len(row.positions) for row in rows]
        new = [
            row.positions[at // step] + at % step
            for row, step in zip(rows, each, strict=True)
            for at in range(row.queries)
        ]
        self._positions = np.array(new, dtype=np.int64)[:, None]
        self._ahead = np.repeat(each, [row.queries for row in rows]).reshape(-1, 1)
        width = max((len(row.spans) for row in rows), default=0)
        spans = [row.spans + ((0, 0),) * (width - len(row.spans)) for row in rows for _ in range(row.queries)]
        ends = np.array(spans, dtype=np.int64).reshape(len(new), width, 2)
        self._starts, self._sizes = ends[..., 0], ends[..., 1] - ends[..., 0]
        self.tensors = {kind: torch.empty(len(new), dtype=torch.int32) for kind in kinds if kind.visible != "full"}
        """int32 [queries] of each kind, on the host; :meth:`advance` changes them in place."""
        self._write()

    def advance(self) -> None:
        """Advance to the next step: each sequence has as many new tokens as before."""
        self._positions += self._ahead
        self._write()

    def _write(self) -> None:
        for kind, tensor in self.tensors.items():
            hidden = np.clip(kind.first(self._positions) - self._starts, 0, self._sizes)
            tensor[:] = torch.from_numpy(hidden.sum(1).astype(np.int32))
