"""The engine: what a user holds to ask a model on a Dask cluster about prompts longer than any worker's KV memory."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import secrets
from array import array
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

from dask.base import get_annotations
from distributed import Client, get_client, span

from distkv_dask.client.batch import process
from distkv_dask.client.document import Document
from distkv_dask.client.errand import Errand
from distkv_dask.client.generation import Generation, TextPieces
from distkv_dask.client.library import Library
from distkv_dask.client.pictures import engine_html
from distkv_dask.client.request import Request
from distkv_dask.client.tokenizer import Tokenizer
from distkv_dask.client.trace_fetcher import TraceFetcher
from distkv_dask.client.trace_file import TraceFile
from distkv_dask.config import Config
from distkv_dask.errors import ClusterError, DistKVError, EngineClosedError, InvalidRequestError
from distkv_dask.json_schema import grammar_of
from distkv_dask.model_source import resolve_model
from distkv_dask.model_support import check_supported
from distkv_dask.protocol import PLUGIN, ClientCall, DaskSpan, Delivery, EngineSpec, Submission, pack, unpack
from distkv_dask.scheduler.gmanager import GManager
from distkv_dask.types import Completion, FinishReason, Prompt, SamplingParams, Timings

logger = logging.getLogger("distributed.distkv.engine")

PATIENCE = 10.0
"""Seconds that the answer to a call for news may be late before the scheduler counts as gone."""

POLL = 10.0
"""Seconds that a call for news waits at the gManager."""


class Engine:
    """A model served by all workers of a Dask cluster, whose KV caches form one pool.

    Parameters
    ----------
    client
        Dask client; None takes the current one. With an asynchronous client, ``await`` the engine or use
        ``async with``, and await ``generate``, ``status`` and ``close``.
    model
        A Hugging Face directory or hub name, a GGUF file, or ``"smollm2-135m"``; every worker must be able to read it.
    dtype
        Of weights and KV cache: ``"auto"`` (the checkpoint's), ``"bfloat16"``, ``"float16"`` or ``"float32"``.
    kv_memory
        KV memory of each worker: bytes, or text such as ``"64 MiB"``; None takes half of the worker's memory limit.
    rope_scaling
        For sequences longer than the model was made for: ``{"rope_type": "yarn", "factor": 4.0}`` (or ``"linear"``)
        multiplies its window by four. Answers lose some quality, more so with models not trained for it.
    **settings
        Any field of :class:`~distkv_dask.config.Config`.

    Attributes
    ----------
    tokenizer
        The model's :class:`~distkv_dask.client.tokenizer.Tokenizer`, once the engine is open.

    Raises
    ------
    ConfigError, ModelError, UnsupportedModelError, CapacityError, ClusterError
        When the engine cannot be opened; the message says what to change.

    Examples
    --------
    >>> with Engine(client, model="smollm2-135m", kv_memory="64 MiB") as engine:  # doctest: +SKIP
    ...     done = engine.generate(["What is gravity?"], SamplingParams(max_new_tokens=64))
    ...     print(done[0].text)
    """

    def __init__(
        self,
        client: Client | None = None,
        model: str = "smollm2-135m",
        *,
        dtype: str = "auto",
        kv_memory: int | str | None = None,
        rope_scaling: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> None:
        self.client = client if client is not None else get_client()
        self.config = Config.load(kv_memory=kv_memory, **settings)
        self.model = resolve_model(model, rope_scaling)
        self.dtype = dtype
        self.id = secrets.token_hex(4)
        self._span = _dask_span("distkv", f"{self.model.name.rsplit('/', 1)[-1]} {self.id}")
        self._facts: dict[str, Any] = {}
        self._closed = False
        self._broken: DistKVError | None = None
        self._numbers = itertools.count()
        self._requests: dict[int, Request | Errand] = {}
        self._outgoing: list[Request | Errand] = []
        self._flushing: asyncio.Task[None] | None = None
        self._library = Library(self, self._numbers, self._send_errand, self._flushed, self._give_up)
        self._trace: TraceFetcher | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        if not self.client.asynchronous:
            self.client.sync(self._open)

    # Opening and closing

    async def _open(self) -> Self:
        if self._facts:
            return self
        self._loop = loop = asyncio.get_running_loop()
        if self.config.trace:
            self._trace = TraceFetcher(TraceFile(self.config.trace, self.id), self._fetch_trace)
        await loop.run_in_executor(None, lambda: check_supported(self.model.config()))
        await self._install()
        model, token = self.model, secrets.token_hex(32)
        spec = EngineSpec(self.id, model.name, self.dtype, token, self.config, model.rope_scaling, self._span)
        tokenizer = loop.run_in_executor(None, self.model.tokenizer)
        try:
            facts = await self._call(ClientCall.OPEN, spec=pack(spec), client=self.client.id)
            if not facts:  # Dask answers nothing to calls that nobody handles
                raise ClusterError(f"no gManager answers in the scheduler: plugin {PLUGIN!r} failed there; see its log")
            self.tokenizer = Tokenizer(await tokenizer, facts["vocab_size"])
        except BaseException:  # interrupted ones too: no worker may be left with a model that nobody uses
            tokenizer.add_done_callback(lambda loaded: loaded.cancelled() or loaded.exception())
            await asyncio.shield(self._call_quietly(ClientCall.CLOSE, engine=self.id))
            raise
        self._facts = facts
        self._spawn(self._listen())
        if self._trace is not None:
            self._trace.start()
        return self

    async def _install(self) -> None:
        """Install the gManager, once per cluster."""
        try:
            await self.client.register_plugin(GManager(), name=PLUGIN)
        except DistKVError:
            raise
        except Exception as error:
            raise ClusterError(
                f"the gManager could not be installed in the scheduler: {error!r}. Scheduler and workers need the same "
                f"distkv-dask as this process; see the scheduler's log."
            ) from error

    def close(self) -> Any:
        """End all requests (their futures are cancelled) and free everything on the cluster; returns when done."""
        if self.client.status == "closed":  # and its engines with it
            self._closed = True
            return None
        return self.client.sync(self._close)

    async def _close(self) -> None:
        if self._closed:
            return
        self._closed = True
        for request in list(self._requests.values()):
            request.generation.cancel()
        for task in list(self._tasks):
            task.cancel()
        if self._trace is not None:
            await self._trace.close()
        await self._call_quietly(ClientCall.CLOSE, engine=self.id)

    def __enter__(self) -> Self:
        if not self._facts:
            raise EngineClosedError("the engine is not open: with an asynchronous client, use `async with`")
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __await__(self) -> Generator[Any, None, Self]:
        """Open the engine (asynchronous clients)."""
        return self._open().__await__()

    async def __aenter__(self) -> Self:
        return await self._open()

    async def __aexit__(self, *exc: object) -> None:
        await self._close()

    # Requests

    def generate(
        self, prompts: Prompt | Sequence[Prompt], sampling: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> Any:
        """Answer prompts, decoding them together; returns a list of :class:`Completion` in their order.

        Parameters
        ----------
        prompts
            Texts, lists of token ids, or lists of chat messages; a single text is a list of one.
        sampling
            One for all prompts or one for each; None is ``SamplingParams()``.

        Returns
        -------
        list[Completion]
            A request that fails does not stop the others: its ``finish_reason`` is ``"error"`` and ``error`` says why.

        Raises
        ------
        InvalidRequestError
            When ``prompts`` is not a list of prompts, or ``sampling`` has another length.
        EngineClosedError
            When the engine is closed.
        """
        self._check_open()
        return self._answer(_several(prompts), sampling, self.submit)

    def _answer(
        self,
        several: list[Any],
        sampling: SamplingParams | Sequence[SamplingParams] | None,
        submit: Callable[[Any, SamplingParams | None], Generation],
    ) -> Any:
        """Submit prompts, or questions on a document, and wait for all of them."""
        params = (
            [sampling] * len(several) if sampling is None or isinstance(sampling, SamplingParams) else list(sampling)
        )
        if len(params) != len(several):
            raise InvalidRequestError(
                f"{len(several)} prompts, but {len(params)} sampling parameters: give one or as many"
            )
        accepted: list[Generation | Completion] = []
        for prompt, one in zip(several, params, strict=True):
            try:
                accepted.append(submit(prompt, one))
            except InvalidRequestError as error:
                accepted.append(_failed(error))
        return self.client.sync(self._gather, accepted)

    async def _gather(self, accepted: list[Generation | Completion]) -> list[Completion]:
        done: list[Completion] = []
        try:
            for one in accepted:
                if isinstance(one, Completion):
                    done.append(one)
                    continue
                try:
                    done.append(await one)
                except DistKVError as error:
                    done.append(_failed(error, one.timings))
                except asyncio.CancelledError:
                    task = asyncio.current_task()
                    if task is not None and task.cancelling():
                        raise
                    done.append(Completion("", (), 0, "cancelled"))  # the request was, not who waits for it
        except asyncio.CancelledError:
            for one in accepted:
                if isinstance(one, Generation):
                    one.cancel()
            raise
        return done

    def submit(self, prompt: Prompt, sampling: SamplingParams | None = None) -> Generation:
        """Ask for a completion and return at once.

        Returns
        -------
        Generation
            A future: ``result()`` gives the :class:`Completion` or raises what went wrong; ``cancel()`` stops the
            request. It can be awaited.

        Raises
        ------
        InvalidRequestError
            When the prompt cannot be served as it is.
        EngineClosedError
            When the engine is closed.
        """
        return self._submit(prompt, sampling).generation

    def stream(self, prompt: Prompt, sampling: SamplingParams | None = None) -> TextPieces:
        """Ask for a completion and iterate (``for`` or ``async for``) over its text as it is generated."""
        pieces = TextPieces()
        return pieces.follow(self._submit(prompt, sampling, pieces.put).generation)

    @contextlib.contextmanager
    def in_span(self, *tags: str) -> Iterator[None]:
        """Let the engine's Dask tasks belong to a span of their own (``distributed.span``) for a while.

        Tasks serve many requests at once: those of other requests that run meanwhile are in the span too.
        """
        self._enter(_dask_span(*tags))
        try:
            yield
        finally:
            self._enter(self._span)

    def _enter(self, span: DaskSpan) -> None:
        call = partial(self._call_quietly, ClientCall.SPAN, engine=self.id, span=span)
        with contextlib.suppress(RuntimeError):  # the event loop is closed, and the engine with it
            self._loop.call_soon_threadsafe(lambda: self._spawn(call()))

    def _submit(
        self, prompt: Prompt, sampling: SamplingParams | None, on_text: Callable[[str], None] | None = None
    ) -> Request:
        self._check_open()
        return self._submit_ids(self.tokenizer.encode(prompt), sampling, on_text)

    def _submit_ids(
        self,
        ids: list[int],
        sampling: SamplingParams | None,
        on_text: Callable[[str], None] | None = None,
        document: int | None = None,
        keeps: bool = False,
    ) -> Request:
        self._check_open()
        sampling = SamplingParams() if sampling is None else sampling
        if not isinstance(sampling, SamplingParams):
            raise InvalidRequestError(f"sampling is {sampling!r:.100}, but must be SamplingParams(...)")
        if sampling.seed is None and sampling.temperature > 0:
            sampling = _seeded(sampling)
        if sampling.schema is not None:
            grammar_of(str(sampling.schema))
        if len(ids) + sampling.max_new_tokens > self._facts["max_positions"]:
            raise InvalidRequestError(
                f"a prompt of {len(ids)} tokens with max_new_tokens={sampling.max_new_tokens} is longer than the "
                f"model's window of {self._facts['max_positions']} tokens: shorten the prompt or lower max_new_tokens"
            )
        number = next(self._numbers)
        generation = Generation(lambda: self._cancel(number))
        request = Request(
            number, array("i", ids), sampling, self.tokenizer, generation, on_text, document=document, keeps=keeps
        )
        self._requests[number] = request
        self._loop.call_soon_threadsafe(self._send, request)
        return request

    def _send(self, request: Request | Errand) -> None:
        """On the event loop: requests that arrive together travel together, and all of them in order.

        One call is under way at a time: two could overtake each other, and a question the document that it is about.
        """
        self._outgoing.append(request)
        if self._flushing is None or self._flushing.done():
            self._flushing = self._spawn(self._flush())

    async def _flush(self) -> None:
        await asyncio.sleep(0)
        while self._outgoing:
            requests, self._outgoing = self._outgoing, []
            await self._submit_all(requests)

    async def _submit_all(self, requests: list[Request | Errand]) -> None:
        payload = [one.submission() for one in requests if not one.generation.cancelled()]
        try:
            refused = await self._call(ClientCall.SUBMIT, engine=self.id, requests=pack(payload))
        except Exception as failure:
            refused = {number: _ours(failure) for number, *_ in payload}
        for number, error in refused.items():
            if (refusal := self._requests.pop(number, None)) is not None:
                refusal.fail(error)
        for request in requests:
            if request.generation.cancelled():  # perhaps before the cluster knew of it
                self._stop(request.number, "cancelled")

    # Documents

    def ingest(self, source: Prompt | Path, name: str | None = None) -> Any:
        """Compute the KV cache of a document once, to ask many questions about it; returns when it is stored.

        Parameters
        ----------
        source
            A text, a :class:`~pathlib.Path` of a file (.txt, .md, .html, .pdf), a list of token ids, or a list of chat
            messages. Questions follow a text after an empty line, in the same chat message where the model has a chat
            template.
        name
            Its key in :meth:`documents`; None is ``"document-0"`` and so on.

        Returns
        -------
        Document
            Its KV stays until it is released, or the engine closed. Where memory is short, it may be given up and
            computed anew when it is asked next.

        Raises
        ------
        InvalidRequestError, SourceError
            When the document cannot be served as it is, or its file not be read.
        CapacityError
            When it is larger than the memory of all workers.
        """
        self._check_open()
        return self.client.sync(self._library.ingest, source, name)

    def load(self, place: str | Path, name: str | None = None) -> Any:
        """Load a document that :meth:`Document.save` saved, on whatever workers there are now; nothing is computed.

        Parameters
        ----------
        place
            The folder, as a path or URI; all workers have to reach it.
        name
            Its key in :meth:`documents`; None is the one that it was saved with.

        Returns
        -------
        Document
            As :meth:`ingest` gives.

        Raises
        ------
        SavedDocumentError
            There is no whole document, it is of another model, dtype or block size, or a file is damaged.
        CapacityError
            When it is larger than the memory of all workers.
        """
        self._check_open()
        return self.client.sync(self._library.load, str(place), name)

    def documents(self) -> dict[str, Document]:
        """The documents that have not been released, by name."""
        self._check_open()
        return dict(self._library.documents)

    async def _flushed(self) -> None:
        """Wait until the requests so far have arrived at the gManager."""
        if self._flushing is not None:
            await asyncio.wait([self._flushing])

    async def _give_up(self, number: int) -> None:
        if not self._closed:
            await self._call_quietly(ClientCall.STOP, engine=self.id, request=number, reason="cancelled")

    def _begin_document(self, ids: list[int]) -> int:
        """Hand in tokens that many prompts begin with, from any thread, and return the document's number at once."""
        self._check_open()
        number = next(self._numbers)
        self._requests[number] = errand = Errand(Submission(number, array("i", ids), None), self._cancel)
        self._loop.call_soon_threadsafe(self._send, errand)
        return number

    def _end_document(self, number: int) -> None:
        """Need such a document no more, from any thread."""
        if not self._closed:
            self._loop.call_soon_threadsafe(lambda: self._spawn(self._library.release(number)))

    def _send_errand(self, errand: Errand) -> None:
        self._check_open()
        self._requests[errand.number] = errand
        self._send(errand)

    def _cancel(self, number: int) -> None:
        self._loop.call_soon_threadsafe(self._send_cancel, number)

    def _send_cancel(self, number: int) -> None:
        if self._requests.pop(number, None) is not None and not self._closed:
            self._stop(number, "cancelled")

    def _stop(self, number: int, reason: FinishReason) -> None:
        self._spawn(self._call_quietly(ClientCall.STOP, engine=self.id, request=number, reason=reason))

    async def _listen(self) -> None:
        """Take news from the gManager until the engine closes or the scheduler is gone."""
        heard, failures = 0, 0
        while not self._closed:
            wait = 0.0 if failures else POLL
            try:
                news = await asyncio.wait_for(
                    self._call(ClientCall.EVENTS, engine=self.id, heard=heard, wait=wait), wait + PATIENCE
                )
                failures = 0
            except Exception as error:
                failures += 1
                if failures == 1 and not isinstance(error, DistKVError):
                    continue  # once more: the gManager keeps what was not heard
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
        except Exception as error:  # a tokenizer that cannot decode what its model says, for instance
            logger.exception("request %d of engine %s", delivery.sequence, self.id)
            request.fail(_ours(error))
            over = True
            self._stop(delivery.sequence, "error")
        if over:
            self._requests.pop(delivery.sequence, None)
        elif request.wants_stop():
            self._stop(delivery.sequence, "stop")

    def _break(self, error: DistKVError) -> None:
        """Nothing can be heard of the cluster any more: end all requests."""
        self._broken = error
        for number in list(self._requests):
            self._requests.pop(number).fail(error)

    process = process

    # Status

    @property
    def facts(self) -> Mapping[str, Any]:
        """What the workers said at opening: ``max_positions, vocab_size, block_bytes, dtype, workers``."""
        self._check_open()
        return MappingProxyType(self._facts)

    def status(self) -> Any:
        """Where everything is: workers, sequences, debts, totals (a dict of plain values).

        ``workers`` maps an address to ``role, capacity_blocks, used_blocks, lent_blocks``, ``blocks`` (the capacity in
        parts: ``own, lent, documents``, and of what is free ``cached``, which may be used again, and ``free``),
        ``block_bytes``, ``disk_bytes`` (of KV on its disk), ``sequences``, ``channels`` (which kind it opens to whom,
        and why) and ``window_seconds`` (length of its latest decode window);
        ``sequences`` maps a number to ``state, prompt_tokens, generated_tokens, kv_tokens, home, placement``,
        ``document`` (whether it is one: its state is ``"document"``, or ``"dropped"`` while its KV is given up for
        others), its ``name``, whether its KV is ``saved`` in files, too, and ``questions`` (under way, about it);
        ``scheduler`` holds what decides the length of windows in large clusters: ``tasks_per_second`` of all engines,
        ``task_seconds`` (CPU time of the scheduler for one) and ``core_share`` (of one core, all that it does).
        """
        self._check_open()
        return self.client.sync(self._call, ClientCall.STATUS, engine=self.id)

    def graph(self, prompt: Prompt, sampling: SamplingParams | None = None, granularity: str | None = None) -> Any:
        """The Dask graph of one decode step of a prompt, placed as it would be now; nothing is computed.

        Parameters
        ----------
        prompt, sampling
            As for :meth:`submit`; how many tokens there may be decides where they lie.
        granularity
            ``"window"`` or ``"layer"``; None is the engine's own.

        Returns
        -------
        StepGraph
            Its ``tasks`` and the ``workers`` they are pinned to; ``visualize("step.svg")`` draws it.

        Raises
        ------
        InvalidRequestError, CapacityError, ConfigError
            When the prompt cannot be served, there is no room for it now, or the granularity is unknown.
        """
        self._check_open()
        chosen = Config.load(granularity=granularity or self.config.granularity).granularity
        tokens = len(self.tokenizer.encode(prompt)) + (sampling or SamplingParams()).max_new_tokens - 1
        return self.client.sync(self._call, ClientCall.GRAPH, engine=self.id, tokens=tokens, granularity=chosen)

    @property
    def is_open(self) -> bool:
        """Whether it can be asked."""
        return bool(self._facts) and not self._closed and self._broken is None

    def _repr_html_(self) -> str:
        return engine_html(self)

    def __repr__(self) -> str:
        state = "closed" if self._closed else "open" if self._facts else "opening"
        return f"<Engine {self.id} {self.model.name!r} {state}, {len(self._requests)} requests>"

    # Plumbing

    async def _fetch_trace(self) -> Any:
        return await self._call(ClientCall.TRACE, engine=self.id)

    def _check_open(self) -> None:
        if self._closed:
            raise EngineClosedError("the engine is closed: make a new one")
        if self._broken is not None:
            raise EngineClosedError(f"the engine broke: {self._broken}")
        if not self._facts:
            raise EngineClosedError("the engine is not open yet: await it, or use `async with`")

    async def _call(self, call: ClientCall, **arguments: Any) -> Any:
        """Call the gManager; a scheduler that is gone is an EngineClosedError."""
        if self.client.scheduler is None:
            raise EngineClosedError("the Dask client is closed")
        try:
            return unpack(await getattr(self.client.scheduler, call)(**arguments))
        except DistKVError:
            raise
        except OSError as error:
            if self.client.status == "running":
                raise
            raise EngineClosedError(f"the Dask scheduler does not answer: {error!r}") from error

    async def _call_quietly(self, call: ClientCall, **arguments: Any) -> None:
        with contextlib.suppress(EngineClosedError, OSError):
            await self._call(call, **arguments)

    def _spawn(self, work: Any) -> asyncio.Task[None]:
        task: asyncio.Task[None] = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def _several(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """Prompts as a list; one alone that is not a text could be mistaken for several, so it is refused."""
    if isinstance(prompts, str):
        return [prompts]
    try:
        several = list(prompts)
    except TypeError:
        raise InvalidRequestError(f"prompts is {prompts!r:.100}, but must be a list of prompts") from None
    if several and all(isinstance(one, Mapping | int) for one in several):
        raise InvalidRequestError("these are the tokens or messages of one prompt: did you mean generate([prompt])?")
    return several  # type: ignore[return-value]


def _ours(error: Exception) -> DistKVError:
    if isinstance(error, DistKVError):
        return error
    return EngineClosedError(f"the Dask scheduler does not answer as it should: {error!r}")


def _failed(error: DistKVError, timings: Timings | None = None) -> Completion:
    return Completion("", (), 0, "error", str(error), timings or Timings())


def _dask_span(*tags: str) -> DaskSpan:
    """A Dask span within the one that the caller is in."""
    with span(*tags):
        found: DaskSpan = get_annotations()["span"]
        return found


def _seeded(sampling: SamplingParams) -> SamplingParams:
    return replace(sampling, seed=secrets.randbits(62))
