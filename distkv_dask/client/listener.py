"""A socket that listens, or the reason why nothing can listen there."""

from __future__ import annotations

import socket

from distkv_dask.errors import ClusterError

BACKLOG = 128
"""Maximum connections that wait to be accepted."""


def listener_at(host: str, port: int) -> socket.socket:
    """A listening socket; connections wait until they are accepted.

    Raises
    ------
    ClusterError
        When nothing can listen there.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(BACKLOG)
        except BaseException:
            listener.close()
            raise
    except (OSError, UnicodeError) as error:
        raise ClusterError(f"nothing can listen at {host}:{port}: {error}; choose another --host or --port") from error
    return listener
