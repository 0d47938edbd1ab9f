"""Opens and closes an engine on a cluster: installs the gManager, checks and loads the model."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Self

from dask.base import get_annotations
from distributed import Client, span

from distkv_dask.client.session.conversation import Conversation
from distkv_dask.client.session.reach import answered
from distkv_dask.client.session.stage_count import memories, stage_count
from distkv_dask.client.tokenizer import Tokenizer
from distkv_dask.client.trace_fetcher import TraceFetcher
from distkv_dask.client.trace_file import TraceFile
from distkv_dask.config import Config
from distkv_dask.errors import ClusterError, DistKVError, EngineClosedError, in_words
from distkv_dask.messages.client_calls import ClientCall, EngineFacts
from distkv_dask.messages.names import PLUGIN, DaskSpan, EngineSpec, pack
from distkv_dask.models.source import ModelSource, resolve_model
from distkv_dask.models.support import check_supported
from distkv_dask.scheduler.gmanager import GManager
from distkv_dask.version import VERSION


class OwnedEngine:
    """Opens a new engine, which ends with its client; records a trace of it if one is wanted.

    Parameters
    ----------
    model, dtype, config
        What the workers load, and how.
    """

    def __init__(self, model: ModelSource, dtype: str, config: Config) -> None:
        self.model = model
        engine, token = secrets.token_hex(4), secrets.token_hex(32)
        span = dask_span("distkv", f"{model.name.rsplit('/', 1)[-1]} {engine}")
        self.spec = EngineSpec(engine, model.name, dtype, token, config, model.rope_scaling, span)
        self._trace: TraceFetcher | None = None

    @classmethod
    def of(cls, model: str, dtype: str, rope_scaling: Mapping[str, Any] | None, **settings: Any) -> Self:
        """Check a user's settings; raises :class:`ConfigError` or :class:`ModelError`."""
        return cls(resolve_model(model, rope_scaling), dtype, Config.load(**settings))

    async def open(self, conversation: Conversation) -> tuple[EngineFacts, Tokenizer]:
        """Open it; returns the workers' reports, and the model's tokenizer."""
        engine, client, loop = self.spec.engine, conversation.client, asyncio.get_running_loop()
        if self.spec.config.trace:
            fetch = partial(conversation.ask, ClientCall.TRACE)
            self._trace = TraceFetcher(TraceFile(self.spec.config.trace, engine), fetch)
        checking = loop.run_in_executor(None, lambda: check_supported(self.model.config()))
        checking.add_done_callback(_retrieved)
        await _install(client)  # at the same time: imports take this process and the workers seconds
        await checking
        await self._choose_stages(client)
        loading = loop.run_in_executor(None, self.model.tokenizer)
        try:
            facts = await conversation.call(ClientCall.OPEN, spec=pack(self.spec), client=client.id, version=VERSION)
            if facts is None:  # Dask answers calls without a handler with None
                raise ClusterError(f"no gManager answers in the scheduler: plugin {PLUGIN!r} failed there; see its log")
            tokenizer = Tokenizer(await loading, facts.vocab_size)
        except BaseException:  # also if interrupted: no worker may keep a model that is not used
            loading.add_done_callback(_retrieved)
            await asyncio.shield(self._close(conversation))
            raise
        conversation.listen_to(engine)
        if self._trace is not None:
            self._trace.start()
        return facts, tokenizer

    async def _choose_stages(self, client: Client) -> None:
        """Choose the number of stages if that is asked (``distkv.stages: auto``), by what workers have room for."""
        config = self.spec.config
        if config.stages != "auto":
            return
        count = 1
        if config.weights != "disk" and config.device != "cuda":
            assert client.scheduler is not None  # it is connected
            found = await answered(client, client.scheduler.identity(n_workers=-1))
            asked = self.model, self.spec.dtype, memories(found["workers"]), config.kv_memory
            count = await asyncio.get_running_loop().run_in_executor(None, stage_count, *asked)
        self.spec = replace(self.spec, config=replace(config, stages=count))

    async def close(self, conversation: Conversation) -> None:
        """Free everything on the cluster."""
        if self._trace is not None:
            await self._trace.close()
        await self._close(conversation)

    async def _close(self, conversation: Conversation) -> None:
        with contextlib.suppress(EngineClosedError, ClusterError):
            await conversation.call(ClientCall.CLOSE, engine=self.spec.engine)


def _retrieved(done: asyncio.Future[Any]) -> None:
    """Retrieve an exception, so that asyncio does not warn about it."""
    _ = done.cancelled() or done.exception()


def dask_span(*tags: str) -> DaskSpan:
    """A Dask span within the caller's span."""
    with span(*tags):
        found: DaskSpan = get_annotations()["span"]
        return found


async def _install(client: Client) -> None:
    """Install the gManager, once per cluster."""
    try:
        await answered(client, client.register_plugin(GManager(), name=PLUGIN))
    except DistKVError:
        raise
    except Exception as error:
        raise ClusterError(
            f"the gManager could not be installed in the scheduler: {in_words(error)}. Scheduler and workers need the "
            f"same distkv-dask as this process; see the scheduler's log."
        ) from error
