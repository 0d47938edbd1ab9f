"""Attaches to an engine that was opened elsewhere, from any process with a Dask client, and detaches."""

from __future__ import annotations

import asyncio
import contextlib

from distkv_dask.client.session.conversation import Conversation
from distkv_dask.client.session.reach import answered
from distkv_dask.client.tokenizer import Tokenizer
from distkv_dask.errors import ClusterError, EngineClosedError
from distkv_dask.messages.client_calls import Attached, ClientCall, EngineFacts
from distkv_dask.messages.names import PLUGIN, EngineSpec
from distkv_dask.models.source import ModelSource, resolve_model
from distkv_dask.version import VERSION


class AttachedEngine:
    """A handle on an open engine; the engine outlives it.

    Parameters
    ----------
    engine
        The engine's id; ``""`` is the only one that is open.

    Attributes
    ----------
    spec, model
        The settings of the engine's owner, once attached.
    """

    spec: EngineSpec
    model: ModelSource

    def __init__(self, engine: str) -> None:
        self._engine = engine
        self._handle = 0

    async def open(self, conversation: Conversation) -> tuple[EngineFacts, Tokenizer]:
        """Attach to it; returns the workers' reports, and the model's tokenizer."""
        client = conversation.client
        if not await answered(client, client.get_metadata([PLUGIN], default=False)):
            raise ClusterError("no engine is open on this cluster: open one with Engine(client, model=...)")
        attached: Attached = await conversation.call(
            ClientCall.ATTACH, engine=self._engine, client=client.id, version=VERSION
        )
        self.spec, facts, self._handle = attached
        try:
            self.model = await asyncio.to_thread(resolve_model, self.spec.model, self.spec.rope_scaling)
            tokenizer = Tokenizer(await asyncio.to_thread(self.model.tokenizer), facts.vocab_size)
        except BaseException:
            await asyncio.shield(self.close(conversation))
            raise
        conversation.listen_to(self.spec.engine, self._handle)
        return facts, tokenizer

    async def close(self, conversation: Conversation) -> None:
        """Detach: the handle's requests end, its documents are released, and the engine stays open."""
        with contextlib.suppress(EngineClosedError, ClusterError):
            await conversation.call(ClientCall.DETACH, engine=self.spec.engine, handle=self._handle)
