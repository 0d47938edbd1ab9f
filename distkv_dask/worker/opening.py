"""Opening an engine: the engine, or the message that tells the gManager why there is none.

Importing this module does not import torch, as the rManager's (:mod:`~distkv_dask.worker.rmanager`) does not.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from distributed import Worker

from distkv_dask.errors import DistKVError, EngineClosedError, ModelError, in_words, portable
from distkv_dask.messages.from_worker import FromWorker, Lost, OpenFailed
from distkv_dask.messages.to_worker import Open

if TYPE_CHECKING:
    from distkv_dask.worker.engine import WorkerEngine
    from distkv_dask.worker.lanes import Lanes

logger = logging.getLogger("distributed.distkv.opening")


async def open_engine(
    message: Open,
    lanes: Callable[[], Lanes],
    worker: Worker,
    tell: Callable[[str, FromWorker], None],
) -> WorkerEngine | Lost | OpenFailed:
    """Open an engine in a thread, because Dask's heartbeats must continue; raises nothing.

    Parameters
    ----------
    message
        Which engine, and what this worker computes of its model.
    lanes
        Starts the worker's lanes if they do not run.
    worker
        This worker.
    tell
        Sends messages of the engine to the gManager.
    """

    def build() -> WorkerEngine:
        from distkv_dask.worker.startup import build_engine  # its imports alone take seconds

        return build_engine(message.spec, message.geometry, lanes(), worker, tell, message.stage)

    try:
        return await asyncio.get_running_loop().run_in_executor(None, build)
    except EngineClosedError as error:  # a lane has ended since
        return Lost(worker.address, str(error))
    except DistKVError as error:
        return OpenFailed(worker.address, portable(error, worker.address))
    except Exception as error:
        logger.exception("engine %s cannot be opened", message.spec.engine)
        said = f"worker {worker.address} could not open the engine: {in_words(error)}; see its log"
        return OpenFailed(worker.address, ModelError(said))
