"""A handle to an engine on a cluster: its identity, opening and closing."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, NoReturn, Self

from distributed import Client

from distkv_dask.client.session.session import Session
from distkv_dask.client.tokenizer import Tokenizer
from distkv_dask.config import Config
from distkv_dask.errors import EngineClosedError
from distkv_dask.messages.client_calls import EngineFacts
from distkv_dask.models.source import ModelSource


class Handle:
    """The part of :class:`~distkv_dask.Engine` without requests: identity, opening and closing."""

    _session: Session

    # Identity

    @property
    def client(self) -> Client:
        """The Dask client."""
        return self._session.client

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer, once the engine is open."""
        return self._session.tokenizer

    @property
    def id(self) -> str:
        """The engine's id in the cluster, for :meth:`attach`, ``distkv status`` and the dashboard."""
        return self._session.id

    @property
    def config(self) -> Config:
        """The engine's settings."""
        return self._session.config

    @property
    def dtype(self) -> str:
        """Dtype of weights and KV cache, as requested."""
        return self._session.dtype

    @property
    def model(self) -> ModelSource:
        """Where the model comes from."""
        return self._session.model

    @property
    def facts(self) -> EngineFacts:
        """What the workers reported when the engine opened."""
        return self._session.facts

    @property
    def is_open(self) -> bool:
        """Whether it accepts requests."""
        return self._session.is_open

    def __repr__(self) -> str:
        session = self._session
        if session.state == "attaching":
            return "<Engine attaching>"
        return f"<Engine {self.id} {self.model.name!r} {session.state}, {len(session.conversation)} requests>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("an engine cannot be sent to a task: send its id, and use Engine.attach(id) there")

    # Opening and closing

    async def _opened(self) -> Self:
        await self._session.open()
        return self

    def close(self) -> Any:
        """End all requests (their futures are cancelled) and free everything on the cluster; returns when done.

        An attached handle only ends its own requests and documents.
        """
        return self._session.close()

    def __enter__(self) -> Self:
        if not self._session.was_opened:
            raise EngineClosedError("the engine is not open: with an asynchronous client, use `async with`")
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __await__(self) -> Generator[Any, None, Self]:
        """Open the engine, or attach to it (asynchronous clients)."""
        return self._opened().__await__()

    async def __aenter__(self) -> Self:
        return await self._opened()

    async def __aexit__(self, *exc: object) -> None:
        await self._session.end()
