"""Which kind of channel a home opens to a holder (``distkv.channel``), and why."""

from __future__ import annotations

from distkv_dask.errors import ChannelError, ConfigError
from distkv_dask.placement import Endpoint
from distkv_dask.worker.channels.base import Channel
from distkv_dask.worker.channels.optional_ucx import UcxHome
from distkv_dask.worker.channels.tcp import TcpChannel
from distkv_dask.worker.channels.tls import Certificates, TlsChannel
from distkv_dask.worker.channels.unix import UnixChannel, is_near, machine


class Dialer:
    """Opens channels of the configured kind.

    Parameters
    ----------
    choice
        ``"auto"``, ``"tcp"``, ``"unix"`` or ``"ucx"``.
    certificates
        If given, TCP uses TLS. A Unix socket never does: its bytes stay in the kernel of one machine, where only the
        worker's own user can read them.
    unencrypted
        Whether UCX, which cannot be encrypted, may be used although there are certificates.
    cluster_ucx
        Whether the cluster itself uses ``ucx://``: then ``"auto"`` uses UCX between machines.

    Raises
    ------
    ConfigError
        ``"ucx"`` with certificates, and not ``unencrypted``.
    """

    def __init__(
        self, choice: str, certificates: Certificates | None, unencrypted: bool = False, cluster_ucx: bool = False
    ) -> None:
        if choice == "ucx" and certificates is not None and not unencrypted:
            raise ConfigError(
                "distkv.channel is ucx, which cannot be encrypted, but this cluster has certificates: set it to auto, "
                "tcp or unix, or distkv.unencrypted-channels to true if its network can be trusted"
            )
        self._choice = choice
        self._certificates = certificates
        self.uses_ucx = choice == "ucx" or (choice == "auto" and cluster_ucx and certificates is None)
        """Whether holders must listen for UCX."""
        self._ucx = UcxHome()

    def connect(self, endpoint: Endpoint, seconds: float) -> Channel:
        """Open a channel to a holder.

        Raises
        ------
        ChannelTimeoutError, ChannelError
            It does not answer within ``seconds``, refuses, or cannot be reached in the configured way.
        """
        near = is_near(endpoint.unix)
        if near and self._choice in ("auto", "unix"):
            return UnixChannel.open(endpoint.unix, endpoint.worker, seconds)
        if self._choice == "unix":
            raise ChannelError(
                f"{endpoint.worker} is on another machine, and distkv.channel is unix: set it to auto, which takes tcp "
                "between machines"
            )
        if self.uses_ucx:
            return self._ucx.open(endpoint.host, endpoint.ucx, endpoint.worker, seconds)
        address = endpoint.host, endpoint.port, endpoint.worker, seconds
        if self._certificates is not None:
            return TlsChannel.open(*address, self._certificates.home)
        return TcpChannel.open(*address)

    def explain(self) -> str:
        """The rule in words, for display."""
        far = "tcp" if self._certificates is None else "tcp with the cluster's TLS"
        if self._choice == "ucx":
            plain = "" if self._certificates is None else ", not encrypted (distkv.unencrypted-channels: true)"
            return f"ucx (distkv.channel: ucx){plain}"
        if self._choice == "tcp":
            return f"{far} (distkv.channel: tcp)"
        if self._choice == "unix":
            return "unix (distkv.channel: unix), workers on other machines are refused"
        if self.uses_ucx:
            far, why = "ucx", ", whose cluster speaks ucx"
        else:
            why = ""
        if not machine():
            return f"{far} (distkv.channel: auto{why}; this system does not tell which workers are on one machine)"
        return f"unix to workers on the same machine, {far} to others (distkv.channel: auto{why})"
