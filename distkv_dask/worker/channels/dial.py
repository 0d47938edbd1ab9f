"""Which kind of channel a home opens to a holder (``distkv.channel``), and why."""

from __future__ import annotations

from distkv_dask.errors import ChannelError
from distkv_dask.types import Endpoint
from distkv_dask.worker.channels.base import Channel
from distkv_dask.worker.channels.tcp import TcpChannel
from distkv_dask.worker.channels.tls import Certificates, TlsChannel
from distkv_dask.worker.channels.unix import UnixChannel, is_near, machine


class Dialer:
    """Opens channels of the configured kind.

    Parameters
    ----------
    choice
        ``"auto"``, ``"tcp"`` or ``"unix"``.
    certificates
        Where they are given, TCP goes with TLS. A Unix socket never does: its bytes stay in the kernel of one machine,
        which shows them to the worker's own user only.
    """

    def __init__(self, choice: str, certificates: Certificates | None) -> None:
        self._choice = choice
        self._certificates = certificates

    def connect(self, endpoint: Endpoint, seconds: float) -> Channel:
        """Open a channel to a holder.

        Raises
        ------
        ChannelTimeoutError, ChannelError
            It does not answer within ``seconds``, refuses, or cannot be reached in the configured way.
        """
        near = is_near(endpoint.unix)
        if near and self._choice != "tcp":
            return UnixChannel.open(endpoint.unix, endpoint.worker, seconds)
        if self._choice == "unix":
            raise ChannelError(
                f"{endpoint.worker} is on another machine, and distkv.channel is unix: set it to auto, which takes tcp "
                "between machines"
            )
        address = endpoint.host, endpoint.port, endpoint.worker, seconds
        if self._certificates is not None:
            return TlsChannel.open(*address, self._certificates.home)
        return TcpChannel.open(*address)

    def explain(self) -> str:
        """The rule in words, for people."""
        far = "tcp" if self._certificates is None else "tcp with the cluster's TLS"
        if self._choice == "tcp":
            return f"{far} (distkv.channel: tcp)"
        if self._choice == "unix":
            return "unix (distkv.channel: unix), workers on other machines are refused"
        if not machine():
            return f"{far} (distkv.channel: auto; this system does not tell which workers are on one machine)"
        return f"unix to workers on the same machine, {far} to others (distkv.channel: auto)"
