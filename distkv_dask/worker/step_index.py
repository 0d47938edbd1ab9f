"""What changes from step to step in a batch's index tensors: written by the host, copied to the device at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from distkv_dask.worker.device import Device


class StepIndex:
    """Index tensors of a batch whose rows stay the same, at addresses that stay the same.

    Parameters
    ----------
    device
        Where the kernels read them.
    rows
        Rows of the batch.
    appended
        Tokens whose KV is appended in each step.

    Attributes
    ----------
    visible, starts
        int32 [rows]: visible tokens of each row, and stored ones before the step.
    blocks, offsets
        int64 [appended]: where the new tokens go.
    """

    def __init__(self, device: Device, rows: int, appended: int) -> None:
        slots, lengths = 2 * appended * torch.int64.itemsize, 2 * rows * torch.int32.itemsize
        self._pair = device.pair((slots + lengths,), torch.uint8)
        self._slots, self._lengths = _parts(self._pair.host, slots, appended, rows)
        (self.blocks, self.offsets), (self.visible, self.starts) = _parts(self._pair.there, slots, appended, rows)

    def write(self, slots: Sequence[tuple[int, int]], visible: Sequence[int], starts: Sequence[int]) -> None:
        """Set all of them for the next step; the copy is queued.

        The host must have waited for the device since the last call, as it does for a step's tokens or partials.

        Parameters
        ----------
        slots
            Block id and offset of each new token; none leaves them as they are.
        visible, starts
            For each row.
        """
        if slots:
            self._slots[:] = torch.tensor(slots).T
        self._lengths[:] = torch.tensor((visible, starts))
        self._pair.up()


def _parts(buffer: torch.Tensor, slots: int, appended: int, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of a buffer: int64 [2, appended] and int32 [2, rows]."""
    return buffer[:slots].view(torch.int64).view(2, appended), buffer[slots:].view(torch.int32).view(2, rows)
