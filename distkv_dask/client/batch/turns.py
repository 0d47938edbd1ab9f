"""Long tasks on workers: they leave the worker's threads to the engine, and only some run at once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

from distributed import Reschedule, Worker, get_worker, secede

TICK = 1.0
"""Seconds between checks of a waiting task whether it was cancelled."""

_turns: WeakKeyDictionary[Worker, dict[str, threading.BoundedSemaphore]] = WeakKeyDictionary()
_turns_lock = threading.Lock()


@contextmanager
def turn(kind: str, at_once: int) -> Iterator[Callable[[], None]]:
    """Leave the worker's threads, and wait for a turn; yields a function that ends a cancelled task.

    Parameters
    ----------
    kind, at_once
        The kind of tasks, and how many of them may run on a worker at once.
    """
    try:
        worker = get_worker()
    except ValueError:  # computed by threads of the client's process
        yield lambda: None
        return
    wanted = partial(_check_wanted, worker, worker.get_current_task())
    secede()
    with _turns_lock:
        turns = _turns.setdefault(worker, {}).setdefault(kind, threading.BoundedSemaphore(at_once))
    while not turns.acquire(timeout=TICK):
        wanted()
    try:
        yield wanted
    finally:
        turns.release()


def _check_wanted(worker: Worker, key: Any) -> None:
    """End a task if its future was cancelled; Dask starts it again if it is needed after all."""
    task = worker.state.tasks.get(key)
    if task is None or task.state == "cancelled":
        raise Reschedule
