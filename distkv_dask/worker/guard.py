"""Keeps a lane's thread alive, and reports if it ends nevertheless."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial

from distkv_dask.errors import in_words

logger = logging.getLogger("distributed.distkv.lanes")


def attempt(call: Callable[[], object]) -> Exception | None:
    """Call a function and return its exception instead of raising it: no peer or call may end a lane."""
    try:
        call()
    except Exception as error:
        return error
    return None


def run_lane(name: str, work: Callable[[], None], on_end: Callable[[str], None]) -> None:
    """Run a lane's work; an exception that ends it is reported, because no code joins the thread.

    Parameters
    ----------
    name
        The lane's name, for display.
    work
        Returns when the lane was closed.
    on_end
        Called with the reason when ``work`` raised.
    """
    try:
        work()
    except BaseException as error:
        logger.critical("the %s of this worker ended", name, exc_info=error)
        if (failure := attempt(partial(on_end, f"its {name} ended: {in_words(error)}"))) is not None:
            logger.error("the end of the %s could not be reported", name, exc_info=failure)
