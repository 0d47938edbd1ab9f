"""``/distkv/status.json``: the result of ``Engine.status`` for all engines of the cluster.

The gManager adds the route to a running scheduler. To have it from the start, name this module in Dask's setting
``distributed.scheduler.http.routes``.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from distributed.http.utils import RequestHandler

from distkv_dask.messages.names import PLUGIN

if TYPE_CHECKING:
    from typing import Any


class StatusJSON(RequestHandler):
    """The board's status as JSON; no engines without a gManager."""

    def get(self) -> None:
        """Answer a GET."""
        manager = self.server.extensions.get(PLUGIN)
        status = {"engines": {}} if manager is None else manager.dispatcher.board.status()
        self.set_header("Content-Type", "application/json")
        self.write(json.dumps(status))


routes: list[tuple[str, type[RequestHandler], dict[str, Any]]] = [("distkv/status.json", StatusJSON, {})]
