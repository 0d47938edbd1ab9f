"""Adds page, plots, JSON route and metrics to a scheduler that is running already, by public interfaces only.

If an optional package (bokeh, prometheus-client) is not installed or the scheduler has no dashboard, that part is left
out, and the log says so once.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from distributed.http.utils import RequestHandler, get_handlers

from distkv_dask.scheduler.dashboard import routes

if TYPE_CHECKING:
    from distributed.scheduler import Scheduler

    from distkv_dask.scheduler.dashboard.board import Board

logger = logging.getLogger("distributed.distkv.dashboard")


class IndividualPlots(RequestHandler):
    """``/individual-plots.json``, from which JupyterLab's extension gets its plots; Dask's own lists only its own."""

    def get(self) -> None:
        """Answer a GET."""
        from bokeh.server.tornado import BokehTornado

        pages = [app for app in self.server.http_application.applications if isinstance(app, BokehTornado)]
        paths = sorted({path for app in pages for path in app.app_paths if path.startswith("/individual-")})
        self.write({path.strip("/").replace("-", " ").title(): path for path in paths})


class Installation:
    """Handlers that were added to one scheduler.

    Parameters
    ----------
    scheduler
        The scheduler of this process.
    board
        What is shown.
    """

    def __init__(self, scheduler: Scheduler, board: Board) -> None:
        self._board = board
        self._collector: Any = None
        prefix = "/"
        bokeh_app = _dashboard(scheduler)
        if bokeh_app is None:
            logger.info("no /distkv page: the scheduler has no dashboard, or bokeh is not installed there")
        else:
            from distkv_dask.scheduler.dashboard.page import add_pages

            prefix = bokeh_app.prefix
            add_pages(scheduler, prefix)
        handlers = get_handlers(scheduler, [routes.__name__], prefix)
        if bokeh_app is not None:
            server = {"dask_server": scheduler}
            handlers.append((f"/{prefix.strip('/')}/individual-plots.json".replace("//", "/"), IndividualPlots, server))
        scheduler.http_application.add_handlers(r".*$", handlers)

    def metrics(self, wanted: bool) -> None:
        """Register or remove the collector of Prometheus metrics."""
        try:
            from prometheus_client import REGISTRY
        except ImportError:
            logger.info("no metrics of ours at /metrics: prometheus-client is not installed in the scheduler")
            return
        from distkv_dask.scheduler.dashboard.prometheus import Collector

        if wanted and self._collector is None:
            self._collector = Collector(self._board)
            REGISTRY.register(self._collector)
        elif not wanted and self._collector is not None:
            REGISTRY.unregister(self._collector)
            self._collector = None


def _dashboard(scheduler: Scheduler) -> Any:
    """Dask's own Bokeh application in this scheduler, if it has one."""
    try:
        from bokeh.server.tornado import BokehTornado
    except ImportError:
        return None
    applications = scheduler.http_application.applications
    return next((app for app in applications if isinstance(app, BokehTornado)), None)
