"""Requests to the cluster other than completions: a document to be computed, saved or loaded."""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import Callable, Generator
from typing import Any

from distkv_dask.errors import EngineClosedError
from distkv_dask.messages.client_calls import Delivery, Submission


class Operation(concurrent.futures.Future[Delivery]):
    """Future of the single delivery that ends it, handled like a request. It can be awaited.

    Parameters
    ----------
    submission
        What is sent to the gManager.
    cancel
        Stops it.
    """

    def __init__(self, submission: Submission, cancel: Callable[[int], None]) -> None:
        super().__init__()
        self.number = submission.number
        self.submission = submission
        self._cancel = cancel

    @property
    def generation(self) -> Operation:
        """The future, under the name that requests use."""
        return self

    def receive(self, delivery: Delivery) -> bool:
        """Receive its result or its error; returns True because nothing follows."""
        if delivery.error is not None:
            self.fail(delivery.error)
        elif delivery.reason == "cancelled":
            self.fail(EngineClosedError("the engine was closed before this was done"))
        elif not self.done():
            self.set_result(delivery)
        return True

    def wants_stop(self) -> bool:
        """Nothing is generated, so nothing can be stopped early."""
        return False

    def fail(self, error: Exception) -> None:
        """End with an error."""
        if not self.done():
            self.set_exception(error)

    def cancel(self) -> bool:
        """Stop it; returns True unless it had ended."""
        cancelled = super().cancel()
        if cancelled:
            self._cancel(self.number)
        return cancelled

    def __await__(self) -> Generator[Any, None, Delivery]:
        """Wait for it in a coroutine."""
        return asyncio.wrap_future(self).__await__()
