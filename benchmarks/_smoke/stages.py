"""Stages that fail independently, each with a time limit, and print their figures at once."""

from __future__ import annotations

import contextlib
import json
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

Figures = dict[str, Any]


class LateError(Exception):
    """A stage exceeded its time limit."""


class Stages:
    """Runs stages until the time is up.

    Parameters
    ----------
    seconds
        Time limit of all stages together.
    """

    def __init__(self, seconds: float) -> None:
        self.found: dict[str, Figures] = {}
        self._end = time.monotonic() + seconds

    def run(self, name: str, seconds: float, stage: Callable[[Figures], bool | None]) -> None:
        """Run a stage, which fills in its figures and returns whether they are right (None: not checked)."""
        began, figures = time.monotonic(), dict[str, Any]()
        try:
            with _limit(min(seconds, self._end - began)):
                right = stage(figures)
            figures["ok"] = right is not False
        except Exception as error:  # a failure here must not stop the other stages
            where = traceback.extract_tb(error.__traceback__)[-1]
            figures |= {"ok": False, "error": f"{type(error).__name__}: {error!s:.300}"}
            figures["at"] = f"{where.filename.rsplit('/', 1)[-1]}:{where.lineno}"
        figures["seconds"] = round(time.monotonic() - began, 1)
        self.found[name] = figures
        print(json.dumps({name: figures}), flush=True)


@contextlib.contextmanager
def _limit(seconds: float) -> Iterator[None]:
    """Raise LateError inside the ``with`` statement after ``seconds`` seconds."""

    def late(*_: object) -> None:
        raise LateError(f"it took longer than {seconds:.0f} s")

    if seconds <= 1:
        raise LateError("no time was left")
    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
