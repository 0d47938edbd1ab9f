"""An rManager without Dask: a worker that records what is sent, and engines that record their calls."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from distributed.core import Status

from distkv_dask.messages.names import MEMORY_RESOURCE, unpack
from distkv_dask.worker.rmanager import RManager

ADDRESS = "inproc://w0"
Call = tuple[str, tuple[Any, ...]]


class AtOnce:
    """A stand-in for Dask's loop, which runs callbacks as soon as they are added."""

    def add_callback(self, call: Callable[..., Any], *given: Any) -> None:
        call(*given)


class Threaded:
    """A stand-in for Dask's loop that runs callbacks of all threads on the running loop, in order."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()

    def add_callback(self, call: Callable[..., Any], *given: Any) -> None:
        self._loop.call_soon_threadsafe(call, *given)


class Managed:
    """An rManager on a worker, and what it sent to the scheduler."""

    def __init__(self, loop: AtOnce | Threaded) -> None:
        self.sent: list[dict[str, Any]] = []
        self.worker: Any = SimpleNamespace(
            address=ADDRESS,
            stream_handlers={},
            handlers={},
            loop=loop,
            nanny=None,
            status=Status.running,
            batched_stream=SimpleNamespace(send=self.sent.append),
            state=SimpleNamespace(total_resources={MEMORY_RESOURCE: 1}, nthreads=1),
        )
        self.manager = RManager()
        self.manager.setup(self.worker)

    @property
    def told(self) -> list[tuple[str, Any]]:
        """Engines and messages, without the message that announces the worker."""
        return [(one["engine"], unpack(one["message"])) for one in self.sent if "message" in one]

    @property
    def kinds(self) -> list[tuple[str, str]]:
        """Engines and the names of messages."""
        return [(engine, type(message).__name__) for engine, message in self.told]


class Recorded:
    """Any object: records calls of itself and of its attributes, by name."""

    def __init__(self, calls: list[Call], name: str = "") -> None:
        self._calls, self._name = calls, name

    def __getattr__(self, name: str) -> Recorded:
        return Recorded(self._calls, f"{self._name}.{name}".lstrip("."))

    def __call__(self, *given: Any) -> None:
        self._calls.append((self._name, given))
