"""Index tensors of a batch: passed on the host or the pool's device, read on the host, used on the device."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

Ints = npt.NDArray[np.int64]


class Index(NamedTuple):
    """The index tensors of a call; see :func:`distkv_dask.kernels.micro_attention`.

    Pass them on the host, where reading them does not wait for a device.
    """

    block_tables: torch.Tensor
    lengths: torch.Tensor
    query_offsets: torch.Tensor | None
    q_start: torch.Tensor | None
    first_keys: torch.Tensor | None = None

    def on(self, device: torch.device) -> Index:
        """The same tensors on a device; those already there are not copied."""
        return Index(*(beside(x, device) for x in self))

    def read(self) -> tuple[Ints, Ints, Ints | None, Ints | None, Ints | None]:
        """Their values; those on a device are copied at once, and the host waits for the copy."""
        given = [x for x in self if x is not None]
        there = [x.reshape(-1) for x in given if not x.is_cpu]
        flat = iter(torch.cat(there).cpu().split([len(x) for x in there]) if there else ())
        values = iter([(x if x.is_cpu else next(flat).view(x.shape)).numpy().astype(np.int64) for x in given])
        tables, lengths, offsets, starts, first_keys = (None if x is None else next(values) for x in self)
        assert tables is not None
        assert lengths is not None
        return tables, lengths, offsets, starts, first_keys


def beside(value: Any, device: torch.device) -> Any:
    """A host tensor, copied to a device; anything else is returned for the checks to refuse."""
    return value.to(device) if isinstance(value, torch.Tensor) and value.is_cpu else value
