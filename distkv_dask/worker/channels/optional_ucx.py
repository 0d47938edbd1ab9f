"""UCX channels if ``ucxx`` is installed: other modules use them through this one, which imports without it."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

from distkv_dask.errors import MissingProgramError

if TYPE_CHECKING:
    from distkv_dask.worker.channels.ucx import Left, UcxChannel
    from distkv_dask.worker.channels.ucx_inlet import UcxListener

_MISSING = (
    "distkv.channel is ucx, but the package ucxx cannot be imported on this worker ({}): install it with "
    "pip install 'distkv-dask[ucx]' on every worker, or set distkv.channel to auto"
)


def ucx_listener(maximum: int) -> UcxListener:
    """Listener for homes; see :class:`distkv_dask.worker.channels.ucx_inlet.UcxListener`.

    Raises
    ------
    MissingProgramError
        ``ucxx`` is not installed.
    """
    try:
        from distkv_dask.worker.channels.ucx_inlet import UcxListener
    except ImportError as error:
        raise MissingProgramError(_MISSING.format(error)) from error
    return UcxListener(maximum)


class UcxHome:
    """Opens channels for one engine's home; its UCX context is made for the first."""

    def __init__(self) -> None:
        self._left: Left = []

    def open(self, host: str, port: int, peer: str, seconds: float) -> UcxChannel:
        """Start connecting; see :meth:`distkv_dask.worker.channels.ucx.UcxChannel.open`."""
        from distkv_dask.worker.channels.ucx import UcxChannel, close_left

        close_left(self._left)
        return UcxChannel.open(host, port, peer, seconds, self._context, self._left)

    @cached_property
    def _context(self) -> Any:
        from distkv_dask.worker.channels.ucx_line import new_context

        return new_context()
