"""Buffers of a holder's requests and answers: in the channel's own memory, or on a card."""

from __future__ import annotations

from torch import Tensor

from distkv_dask.worker.device import Device, Pair


class Desk:
    """Both sides of the requests of a batch.

    Parameters
    ----------
    device
        The device that answers them.
    body
        uint8 [bytes]: the channel's buffer with each request.
    result
        float32 [n]: the answers, on the device.

    Attributes
    ----------
    question
        uint8 [bytes] on the device: the request after :meth:`fetch`.
    reply
        float32 [n] on the host: the answer after :meth:`leave`.
    """

    def __init__(self, device: Device, body: Tensor, result: Tensor) -> None:
        self._device = device
        self._body = body
        self._came = Pair(body, body) if device.is_host else device.pair(body.shape, body.dtype)
        self._left = device.mirror(result)
        self.question = self._came.there
        self.reply = self._left.host

    def fetch(self) -> None:
        """Queue the copy of the received request to the device."""
        if self._came.host is not self._body:
            self._came.host.copy_(self._body)
            self._came.up()

    def leave(self) -> None:
        """Copy the answer to the host, and wait for it: the only host wait of a request."""
        self._left.down()
        self._device.finish()
