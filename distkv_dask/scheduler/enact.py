"""Carries out the commands of a state machine: each leaves for the workers, for Dask, or for a client."""

from __future__ import annotations

import logging
from collections.abc import Callable
from time import monotonic

from distkv_dask.messages.client_calls import Delivery
from distkv_dask.messages.to_worker import ToWorker
from distkv_dask.scheduler import commands as do
from distkv_dask.scheduler.engines.engine import EngineState
from distkv_dask.scheduler.tasks.lowering import lower
from distkv_dask.scheduler.tasks.submitter import Submitter

logger = logging.getLogger("distributed.distkv.gmanager")


def enact(
    command: do.Command, state: EngineState, submitter: Submitter, send: Callable[[EngineState, ToWorker], None]
) -> None:
    """Carry out one command.

    Parameters
    ----------
    command
        Of the engine's state machine.
    state
        The engine.
    submitter
        Takes tasks.
    send
        Sends a message about the engine to a worker.

    Raises
    ------
    TypeError
        It is no command.
    """
    match command:
        case ToWorker():
            send(state, command)
        case do.SubmitWindow(patience=patience) if state.spec.config.granularity == "window":
            submitter.submit(*lower(command, "window", state.layers), patience, state.span)
        case do.SubmitPrefill() | do.SubmitWindow() | do.AddHolders():
            submitter.submit(*lower(command, state.spec.config.granularity, state.layers), span=state.span)
        case do.ForgetTasks(gang, finished):
            submitter.forget_tasks(gang, finished)
        case do.Note(kind, text):
            state.figures.happened(monotonic(), kind, text)
            if kind == "repair":
                logger.warning(text)
        case do.Count(total, more):
            state.figures.totals[total] += more
        case Delivery():
            state.deliver(command)
        case do.Refuse():
            pass  # the gManager answers the client's call with it
        case _:
            raise TypeError(f"nobody carries out {type(command).__name__}")
