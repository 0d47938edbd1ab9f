"""A worker's two compute threads, and the address of its holder lane."""

from __future__ import annotations

from collections.abc import Callable

from distkv_dask.placement import Endpoint
from distkv_dask.worker.channels.tls import Certificates
from distkv_dask.worker.holder.lane import HolderLane
from distkv_dask.worker.home.lane import HomeLane


class Lanes:
    """Home lane and holder lane of one worker, shared by the engines that are open on it.

    Parameters
    ----------
    worker
        The worker's Dask address.
    host
        Host on which the holder lane listens, as other workers reach it.
    threads
        torch threads of each lane.
    certificates
        The worker's, if the cluster has any: then TCP channels use TLS.
    on_end
        Called with the reason, in any thread, when a lane ends without :meth:`close`: then neither lane is usable.
    """

    def __init__(
        self,
        worker: str,
        host: str,
        threads: int,
        certificates: Certificates | None = None,
        on_end: Callable[[str], None] = lambda reason: None,
    ) -> None:
        self.threads = threads
        self.certificates = certificates
        self.home = HomeLane(threads, on_end)
        self.holder = HolderLane(host, threads, certificates, on_end)
        self._address = worker, host

    @property
    def closed(self) -> bool:
        """Whether a lane was closed or has ended."""
        return self.home.closed or self.holder.closed

    @property
    def endpoint(self) -> Endpoint:
        """The address of the holder lane."""
        return Endpoint(*self._address, self.holder.port, self.holder.unix, self.holder.ucx)

    def close(self, timeout: float = 10.0) -> None:
        """End both threads; engines must have been closed before. Can be called again.

        Raises
        ------
        TimeoutError
            A lane is still busy after ``timeout`` seconds.
        """
        self.holder.close(timeout)
        self.home.close(timeout)
