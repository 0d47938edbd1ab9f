"""A session: an engine as used by one client, with token ids. Engine, Document and batch build on it."""

from __future__ import annotations

import contextlib
import os
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Self

from distributed import Client, get_client

from distkv_dask.adapter import Adapter
from distkv_dask.client.session.attached_engine import AttachedEngine
from distkv_dask.client.session.branches import branch_samplings, joined
from distkv_dask.client.session.choices import choice_ids
from distkv_dask.client.session.conversation import Conversation
from distkv_dask.client.session.generation import Generation, Piece
from distkv_dask.client.session.in_task import check_seceded
from distkv_dask.client.session.owned_engine import OwnedEngine, dask_span
from distkv_dask.client.session.reach import connected, is_closed, lost
from distkv_dask.client.session.request import Request, checked
from distkv_dask.client.session.store import DocumentStore
from distkv_dask.client.tokenizer import Tokenizer
from distkv_dask.config import Config
from distkv_dask.errors import EngineClosedError, InvalidRequestError
from distkv_dask.messages.client_calls import ClientCall, EngineFacts, Generate
from distkv_dask.messages.status import EngineStatus
from distkv_dask.models.adapter_files import read_adapter
from distkv_dask.models.source import ModelSource
from distkv_dask.quotes import Quoting
from distkv_dask.sampling import Prompt, SamplingParams


class Session:
    """All requests to an engine, and its answers.

    With a synchronous client it opens when created; with an asynchronous one, :meth:`open` it.

    Parameters
    ----------
    client
        Dask client; None takes the current one, in a task the one of its worker.
    engine
        Opens and closes it: a new engine, or a handle on an open one.

    Attributes
    ----------
    conversation
        Requests out, events in.
    store
        Documents by number.
    tokenizer
        The model's, once it is open.
    """

    tokenizer: Tokenizer

    def __init__(self, client: Client | None, engine: OwnedEngine | AttachedEngine) -> None:
        self.client = client if client is not None else get_client()
        check_seceded(self.client)
        self.conversation = Conversation(self.client)
        self.store = DocumentStore(self.conversation)
        self._engine = engine
        self._facts: EngineFacts | None = None
        if not self.client.asynchronous:
            if is_closed(self.client):
                raise EngineClosedError(lost(self.client))
            self.client.sync(self.open)

    # What it is

    @property
    def id(self) -> str:
        """The engine's."""
        return self._engine.spec.engine

    @property
    def config(self) -> Config:
        """The engine's settings."""
        return self._engine.spec.config

    @property
    def dtype(self) -> str:
        """Dtype of weights and KV cache, as requested."""
        return self._engine.spec.dtype

    @property
    def model(self) -> ModelSource:
        """Where the model comes from."""
        return self._engine.model

    @property
    def facts(self) -> EngineFacts:
        """The workers' reports at opening; raises :class:`EngineClosedError` once it is closed."""
        self.check_open()
        assert self._facts is not None  # an engine that can be asked has answered
        return self._facts

    @property
    def state(self) -> str:
        """State for display: ``attaching, opening, open`` or ``closed``."""
        if self.conversation.is_closed:
            return "closed"
        if self._facts is not None:
            return "open"
        return "opening" if isinstance(self._engine, OwnedEngine) else "attaching"

    # Opening and closing

    async def open(self) -> Self:
        """Open the engine, or attach to it, unless already done."""
        if self._facts is None:
            await connected(self.client)
            self._facts, self.tokenizer = await self._engine.open(self.conversation)
        return self

    async def end(self) -> None:
        """End all requests, and release everything of this session on the cluster."""
        if not self.conversation.is_closed:
            self.conversation.end()
            await self._engine.close(self.conversation)

    def close(self) -> Any:
        """As :meth:`end`; with a synchronous client it has ended on return."""
        if self.client.status == "closed" and not self.client.asynchronous:  # and its engines with it
            self.conversation.is_closed = True
        return self.leave(self.end)

    def leave(self, end: Callable[[], Any]) -> Any:
        """Run the coroutine function ``end``, which releases something; with a synchronous client, wait for it."""
        return self.conversation.leave(end)

    @property
    def was_opened(self) -> bool:
        """Whether the engine answered at opening."""
        return self._facts is not None

    @property
    def is_open(self) -> bool:
        """Whether the engine can be asked."""
        return self.conversation.is_open

    def check_open(self) -> None:
        """Raise :class:`EngineClosedError` if the engine cannot be asked; from any thread."""
        self.conversation.check_open()

    # Requests

    def submit(
        self, prompt: Prompt, sampling: SamplingParams | None = None, on_piece: Callable[[Piece], None] | None = None
    ) -> Generation:
        """Ask for a completion and return at once; raises as :meth:`distkv_dask.Engine.submit` does.

        Parameters
        ----------
        prompt, sampling
            As there.
        on_piece
            Called with each piece of each answer.
        """
        self.check_open()
        return self.ask_ids(self.tokenizer.encode(prompt), sampling, on_piece)

    def ask_ids(
        self,
        ids: Sequence[int],
        sampling: SamplingParams | None = None,
        on_piece: Callable[[Piece], None] | None = None,
        document: int | None = None,
        text: str | None = None,
    ) -> Generation:
        """Ask with token ids, for one answer or for several, which share the prompt's KV; as :meth:`submit_ids`."""
        if not isinstance(sampling, SamplingParams) or max(sampling.n, sampling.best_of or 1) == 1:
            return self.submit_ids(ids, sampling, on_piece, document, text=text).generation
        if on_piece is not None and sampling.best_of is not None:
            raise InvalidRequestError("which answers are the best is known at their end: stream, or leave out best_of")
        seed = checked(sampling, len(ids), self.facts.max_positions, text).seed
        own = document is None and len(ids) > self.config.block_tokens
        shared = self.store.begin_ingest(ids[:-1], adapter=self.adapter(sampling.adapter)).number if own else document
        branches: list[Generation] = []
        try:
            for at, one in enumerate(branch_samplings(replace(sampling, seed=seed))):
                put = None if on_piece is None else _of_branch(at, on_piece)
                branches.append(self.submit_ids(ids, one, put, shared, text=text).generation)
        except BaseException:
            for begun in branches:
                begun.cancel()
            raise
        finally:
            if own and shared is not None:
                self.store.end(shared)
        return joined(branches, sampling, 0 if own else None)

    def submit_ids(
        self,
        ids: Sequence[int],
        sampling: SamplingParams | None = None,
        on_piece: Callable[[Piece], None] | None = None,
        document: int | None = None,
        keeps: bool = False,
        text: str | None = None,
    ) -> Request:
        """Ask with token ids.

        Parameters
        ----------
        ids, sampling, on_piece
            As for :meth:`submit`.
        document
            Number of the document that the prompt begins with; not shared if all of the prompt's tokens have to be
            computed.
        keeps
            Whether prompt and answer become a document, which has the request's number.
        text
            The document's text, which answers may have to quote.
        """
        choices: tuple[tuple[int, ...], ...] = ()
        if isinstance(sampling, SamplingParams) and sampling.choices is not None:
            choices = choice_ids(sampling.choices, self.tokenizer, self.config)
            sampling = replace(sampling, max_new_tokens=max(map(len, choices)))
        quotes = sampling.quotes if isinstance(sampling, SamplingParams) else None
        sampling = checked(sampling, len(ids), self.facts.max_positions, text)
        if sampling.n > 1 or sampling.best_of is not None:
            raise InvalidRequestError("a turn of a chat has one answer: leave out n and best_of")
        if sampling.embed is not None and keeps:
            raise InvalidRequestError("a turn of a chat has an answer: leave out embed")
        number = self.conversation.number()
        if sampling.prompt_logprobs is not None or sampling.embed == "mean":
            document = None
        told = sampling, on_piece is not None, document, keeps
        adapter = self.adapter(sampling.adapter)
        submission = Generate(number, array("i", ids), *told, choices=choices, adapter=adapter)
        generation = Generation(lambda: self.conversation.cancel(number))
        quoting = None if quotes is None or text is None else Quoting(text, quotes)
        request = Request(submission, self.tokenizer.stream(sampling.stop), generation, on_piece, quoting)
        self.conversation.submit(request)
        return request

    def adapter(self, place: str | os.PathLike[str] | None) -> Adapter | None:
        """The adapter in a folder, checked as far as that is possible without the model.

        Raises
        ------
        MissingProgramError, AdapterError, InvalidRequestError
            When peft is not installed, the adapter cannot be computed, or the engine's layers are on several workers.
        """
        if place is None:
            return None
        if (stages := self.config.stage_count) > 1:
            raise InvalidRequestError(
                f"an adapter needs all layers of the model on one worker, but distkv.stages is {stages}: "
                "merge it into the model (peft's merge_and_unload), or open an engine with stages=1"
            )
        return read_adapter(place)

    def try_adapter(self, place: str | os.PathLike[str]) -> None:
        """Compute one token with an adapter, from any thread but the loop's, to learn whether it fits the model.

        Raises
        ------
        DistKVError
            When it does not.
        """
        self.submit_ids((0,), SamplingParams(max_new_tokens=1, adapter=place)).generation.result()

    @contextlib.contextmanager
    def in_span(self, *tags: str) -> Iterator[None]:
        """Put the engine's Dask tasks into a separate span for a while."""
        self.conversation.ask_soon(ClientCall.SPAN, span=dask_span(*tags))
        try:
            yield
        finally:
            self.conversation.ask_soon(ClientCall.SPAN, span=self._engine.spec.span)

    # Questions about the engine

    async def status(self) -> EngineStatus:
        """A snapshot of the engine, see :meth:`distkv_dask.Engine.status`."""
        status: EngineStatus = await self.conversation.ask(ClientCall.STATUS)
        return status

    async def graph(self, tokens: int, granularity: str) -> Any:
        """The Dask graph of a decode step of a request of ``tokens`` tokens."""
        return await self.conversation.ask(ClientCall.GRAPH, tokens=tokens, granularity=granularity)


def _of_branch(branch: int, on_piece: Callable[[Piece], None]) -> Callable[[Piece], None]:
    """A call with pieces of one of several answers."""
    return lambda piece: on_piece(piece._replace(branch=branch))
