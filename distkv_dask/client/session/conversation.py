"""The connection of a client's engine with the gManager: requests out, events in, and calls.

Everything runs on the event loop of the Dask client, except for methods documented as callable from any thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from distributed import Client

from distkv_dask.client.session.operation import Operation
from distkv_dask.client.session.reach import AGAIN, answered, lost
from distkv_dask.client.session.request import Request
from distkv_dask.errors import ClusterError, DistKVError, EngineClosedError, in_words
from distkv_dask.messages.client_calls import ClientCall, Delivery
from distkv_dask.messages.names import HANDLE_NUMBERS, pack, unpack
from distkv_dask.sampling import FinishReason

logger = logging.getLogger("distributed.distkv.engine")

POLL = 9.0
"""Seconds that a long poll waits at the gManager; less than the time that the scheduler may be silent."""

WITHDRAWALS = 0.0, 1.0, 10.0
"""Seconds before each attempt to stop requests of a call without an answer; a call may arrive after its connection has
broken."""

WITHDRAWING = 60.0
"""Time limit in seconds for all attempts."""

ANSWERED = frozenset({ClientCall.ATTACH, ClientCall.SUBMIT, ClientCall.EVENTS, ClientCall.STATUS, ClientCall.GRAPH})
"""Calls that a gManager always answers: None means that the scheduler has no gManager."""


class Conversation:
    """Tracks every request from its submission to its end.

    Parameters
    ----------
    client
        Dask client.
    """

    def __init__(self, client: Client) -> None:
        self.client = client
        self.is_closed = False
        """Whether the user has closed it."""
        self._engine = ""
        self._handle = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._broken: DistKVError | None = None
        self._numbers = itertools.count()
        self._requests: dict[int, Request | Operation] = {}
        self._outgoing: list[Request | Operation] = []
        self._flushing: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        """Requests that have not ended."""
        return len(self._requests)

    # Its beginning and end

    def listen_to(self, engine: str, handle: int = 0) -> None:
        """The engine with this id is open: receive the gManager's events for this handle."""
        self._engine, self._handle = engine, handle
        self._numbers = itertools.count(handle * HANDLE_NUMBERS)
        self._loop = asyncio.get_running_loop()
        self._spawn(self._listen())

    @property
    def is_open(self) -> bool:
        """Whether requests can be submitted."""
        return self._loop is not None and not self.is_closed and self._broken is None and not lost(self.client)

    def check_open(self) -> None:
        """Raise :class:`EngineClosedError` if no requests can be submitted; from any thread."""
        if self.is_closed:
            raise EngineClosedError("the engine is closed: make a new one")
        if self._broken is not None:
            raise EngineClosedError(f"the engine broke: {self._broken}")
        if self._loop is None:
            raise EngineClosedError("the engine is not open yet: await it, or use `async with`")
        if why := lost(self.client):
            raise EngineClosedError(why)

    def end(self) -> None:
        """Cancel all requests, and receive no more events. Calls can still be made."""
        self.is_closed = True
        for request in list(self._requests.values()):
            request.generation.cancel()
        for task in list(self._tasks):
            task.cancel()

    def leave(self, end: Callable[[], Awaitable[None]]) -> Any:
        """Run ``end``, which releases something on the cluster; with a synchronous client, wait for it.

        If the Dask client is closed, nothing is done.
        """
        if self.client.status == "closed" and not self.client.asynchronous:
            return None
        return self.client.sync(end)

    # Requests

    def number(self) -> int:
        """A number for a new request or document; from any thread."""
        return next(self._numbers)

    def submit(self, request: Request | Operation) -> None:
        """Send a request, after earlier ones; from any thread.

        Raises
        ------
        EngineClosedError
            When the engine is closed.
        """
        self.check_open()
        self._requests[request.number] = request
        if not self._soon(self._send, request):
            self._requests.pop(request.number, None)
            raise EngineClosedError("the Dask client is closed, and so are its engines: make a new client and engine")

    def cancel(self, number: int) -> None:
        """Tell the gManager that a request is no longer needed; from any thread."""
        self._soon(self._send_cancel, number)

    def release_document(self, number: int) -> None:
        """Release a document, after the requests so far; from any thread."""
        if not self.is_closed:
            self._soon(lambda: self._spawn(self._release_request(number)))

    async def flushed(self) -> None:
        """Wait until the requests so far have arrived at the gManager."""
        await asyncio.sleep(0)  # requests submitted now are about to be sent
        if self._flushing is not None and not lost(self.client):
            await asyncio.wait([self._flushing])

    async def give_up(self, number: int) -> None:
        """Tell the gManager that a request or document is no longer needed; if the gManager is gone, so are they."""
        if not self.is_closed and self._broken is None:
            await self.ask_quietly(ClientCall.STOP, request=number, reason="cancelled")

    async def _release_request(self, number: int) -> None:
        await self.flushed()
        await self.give_up(number)

    def _soon(self, call: Any, *arguments: Any) -> bool:
        """Call a function on the event loop; False if the loop is closed."""
        assert self._loop is not None  # it was checked when the request was submitted
        try:
            self._loop.call_soon_threadsafe(call, *arguments)
        except RuntimeError:
            return False
        return True

    def _send(self, request: Request | Operation) -> None:
        """Send requests in order, those that arrive together in one call.

        Only one call runs at a time: of two, the second could arrive first, and a question before its document.
        """
        self._outgoing.append(request)
        if self._flushing is None or self._flushing.done():
            self._flushing = self._spawn(self._flush())

    async def _flush(self) -> None:
        await asyncio.sleep(0)
        while self._outgoing:
            requests, self._outgoing = self._outgoing, []
            await self._submit_all(requests)

    async def _submit_all(self, requests: list[Request | Operation]) -> None:
        payload = [one.submission for one in requests if not one.generation.cancelled()]
        try:
            refused = await self.ask(ClientCall.SUBMIT, requests=pack(payload))
        except Exception as failure:
            refused = {one.number: _ours(failure) for one in payload}
            unknown = (one for one in requests if one.number in self._requests or one.generation.cancelled())
            self._spawn(self._withdraw([one.number for one in unknown]))
        for number, error in refused.items():
            if (refusal := self._requests.pop(number, None)) is not None:
                refusal.fail(error)
        for request in requests:
            if request.generation.cancelled():  # perhaps before the cluster received it
                self._stop(request.number, "cancelled")

    async def _withdraw(self, numbers: list[int]) -> None:
        """Stop requests of a call without an answer, which the gManager may have, or get a moment later."""
        with contextlib.suppress(EngineClosedError, TimeoutError):  # the gManager has nothing of them, or is silent
            async with asyncio.timeout(WITHDRAWING):
                for pause in WITHDRAWALS:
                    await asyncio.sleep(pause)
                    for number in numbers:
                        with contextlib.suppress(ClusterError):
                            await self.ask(ClientCall.STOP, request=number, reason="cancelled")

    def _send_cancel(self, number: int) -> None:
        if self._requests.pop(number, None) is not None and not self.is_closed:
            self._stop(number, "cancelled")

    def _stop(self, number: int, reason: FinishReason) -> None:
        self._spawn(self.ask_quietly(ClientCall.STOP, request=number, reason=reason))

    # News

    async def _listen(self) -> None:
        """Receive events from the gManager until the engine closes or the scheduler is gone."""
        heard, failures = 0, 0
        while not self.is_closed:
            wait = 0.0 if failures else POLL
            try:
                news = await self.ask(ClientCall.EVENTS, handle=self._handle, heard=heard, wait=wait)
                failures = 0
            except Exception as error:
                failures += 1
                if failures == 1 and not isinstance(error, EngineClosedError):
                    continue  # poll again: the gManager keeps unacknowledged events
                self._break(_ours(error))
                return
            heard += len(news)
            for delivery in news:
                self._hear(delivery)

    def _hear(self, delivery: Delivery) -> None:
        if (request := self._requests.get(delivery.sequence)) is None:
            return
        try:
            over = request.receive(delivery)
        except Exception as error:  # a tokenizer that cannot decode its model's tokens, for instance
            logger.exception("request %d of engine %s", delivery.sequence, self._engine)
            request.fail(_ours(error))
            over = True
            self._stop(delivery.sequence, "error")
        if over:
            self._requests.pop(delivery.sequence, None)
        elif request.wants_stop():
            self._stop(delivery.sequence, "stop")

    def _break(self, error: DistKVError) -> None:
        """The cluster cannot be reached: end all requests."""
        self._broken = error
        for number in list(self._requests):
            self._requests.pop(number).fail(error)

    # Calls

    async def call(self, call: ClientCall, **arguments: Any) -> Any:
        """Call the gManager.

        Raises
        ------
        EngineClosedError
            The scheduler is gone, silent, or was restarted.
        DistKVError
            The gManager's error, or a call without an answer.
        """
        if why := lost(self.client):
            raise EngineClosedError(why)
        answer = unpack(await answered(self.client, getattr(self.client.scheduler, call)(**arguments)))
        if isinstance(answer, DistKVError):
            raise answer
        if answer is None and call in ANSWERED:
            raise EngineClosedError(f"the Dask scheduler was restarted, and knows nothing of the engine. {AGAIN}")
        return answer

    async def ask(self, call: ClientCall, **arguments: Any) -> Any:
        """Call the gManager about the engine; raises as :meth:`call` does."""
        return await self.call(call, engine=self._engine, **arguments)

    async def ask_quietly(self, call: ClientCall, **arguments: Any) -> None:
        """Call the gManager about the engine; ignores that either is gone."""
        with contextlib.suppress(EngineClosedError, ClusterError):
            await self.ask(call, **arguments)

    def ask_soon(self, call: ClientCall, **arguments: Any) -> None:
        """As :meth:`tell`, without waiting; from any thread."""
        self._soon(lambda: self._spawn(self.ask_quietly(call, **arguments)))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def _ours(error: Exception) -> DistKVError:
    if isinstance(error, DistKVError):
        return error
    return EngineClosedError(
        f"the Dask scheduler sent an invalid answer ({in_words(error)}): see its log, and whether it runs the same "
        "distkv-dask as this process"
    )
