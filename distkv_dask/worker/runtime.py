"""The runtime: one engine on one worker, as home and as holder (the compute half of the paper's rManager)."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from distkv_dask.errors import EngineClosedError, ModelError, in_words
from distkv_dask.gang import ChunkResult, DecodeWindow, Exchanged, Gang, PrefillChunk, SequenceState, WindowResult
from distkv_dask.geometry import Geometry, describe_kinds
from distkv_dask.messages.names import EngineSpec
from distkv_dask.placement import Stage
from distkv_dask.worker.blocks.pool import Pool
from distkv_dask.worker.by_layer.paused import PausedForward
from distkv_dask.worker.channels.bodies import Hello, encode_hello
from distkv_dask.worker.channels.dial import Dialer
from distkv_dask.worker.device import Use
from distkv_dask.worker.holder.service import Limits, Service
from distkv_dask.worker.holder.session import Session
from distkv_dask.worker.home.chunks import Chunks
from distkv_dask.worker.home.gang import ChannelCache, HomeGang
from distkv_dask.worker.home.home_state import Begun, HomeState
from distkv_dask.worker.home.step_attention import StepAttention
from distkv_dask.worker.home.traced import TracedGang, traced_model
from distkv_dask.worker.home.windows import Windows
from distkv_dask.worker.home_runs import HomeRuns
from distkv_dask.worker.lanes import Lanes
from distkv_dask.worker.showing import Showing
from distkv_dask.worker.speculation.speculation import Speculation
from distkv_dask.worker.stages.blocks import NamedBlocks
from distkv_dask.worker.stages.links import StageLinks, further_stages
from distkv_dask.worker.stages.turns import StageTurns
from distkv_dask.worker.trace import Tracer, span

if TYPE_CHECKING:
    from distkv_dask.worker.model.loaded import LoadedModel


class Runtime:
    """Serves one engine on one worker until :meth:`close`.

    Gangs are pure functions of their inputs: a failed one leaves nothing but KV past the committed length.

    Parameters
    ----------
    spec
        The engine: its name, token and time limits.
    model
        The weights; None on a worker that only holds KV.
    pool
        The engine's pool on this worker.
    lanes
        The worker's lanes.
    windows
        KV of layers that stays at the home, if the model has such.

    Raises
    ------
    EngineClosedError
        The lanes are closed.
    ConfigError, MissingProgramError
        The configured channel is not encrypted, or needs ``ucxx``.
    """

    def __init__(
        self, spec: EngineSpec, model: LoadedModel | None, pool: Pool, lanes: Lanes, windows: Windows | None = None
    ) -> None:
        self.pool = pool
        self.paused: dict[int, PausedForward] = {}
        """Gangs by number whose bytes travel with tasks instead of on channels; put here before they run."""
        self.tracer = Tracer() if spec.config.trace else None
        self._ring = None if self.tracer is None else self.tracer.home
        self.spec = spec
        self._model = model if model is None else traced_model(model, self._ring)
        self.lanes = lanes
        token = spec.token.encode()
        heads = pool.kv_heads if model is None else model.geometry.heads
        dtype = str(pool.dtype).removeprefix("torch.")
        kinds = describe_kinds(pool.layer_kinds)
        sizes = pool.layers, heads, pool.kv_heads, pool.head_dim
        hello = Hello(spec.engine, lanes.endpoint.worker, *sizes, dtype, kinds, pool.latent_dim)
        config = spec.config
        cluster_ucx = lanes.endpoint.worker.startswith("ucx://")
        self.dialer = Dialer(config.channel, lanes.certificates, config.unencrypted_channels, cluster_ucx)
        if self.dialer.uses_ucx:
            lanes.holder.offer_ucx()
        self.channels = ChannelCache(self.dialer.connect, encode_hello(token, hello))
        """Channels to holders."""
        self._hello = hello
        self._links: StageLinks | None = None
        self._lock = threading.Lock()
        self._gang: HomeGang | PausedForward | None = None
        self._closed = False
        speculates = model is not None and not model.geometry.home_bytes and config.speculation != "off"
        self.speculation = Speculation(config.speculation) if speculates else None
        """Proposes tokens to decode steps; None without speculation."""
        self.home_state = HomeState(windows)
        """States and windows of sequences, which only homes have."""
        self.exchanged = Exchanged()
        """Bytes and times of the last chunk's or window's exchange with holders."""
        limits = Limits(config.timeout_start, config.timeout_receive)
        ring = None if self.tracer is None else self.tracer.holder
        service = Service(spec.engine, token, pool, limits, ring)
        self._under_way = service.under_way
        if model is not None and isinstance(pool, NamedBlocks):
            service.turns = StageTurns(model, pool)
        lanes.holder.attach(service)

    def link_stages(self, stage: Stage, whole: Geometry) -> None:
        """Compute further layers on other workers, as the home of all sequences.

        Parameters
        ----------
        stage
            The first one, which knows where the others listen.
        whole
            Sizes of the model with all its layers.
        """
        stages = further_stages(stage, whole, self.spec.token.encode(), self._hello)
        self._links = StageLinks(stages, self.dialer.connect, self.spec.config.timeout_receive)

    def reserve(self, sequence: int, start: int, stop: int) -> None:
        """Reserve room for tokens ``[start, stop)`` of a sequence; CapacityError when there is none."""
        self.pool.reserve(sequence, start, stop)

    def release_sequence(self, sequence: int) -> None:
        """Free a sequence's blocks, and its states and windows at the home."""
        self.home_state.drop(sequence)
        self.pool.release_sequence(sequence)

    def open_session(self, gang: Gang) -> Session:
        """Serve a gang as a holder: returns at once, :meth:`Session.wait` waits for its end.

        Raises
        ------
        EngineClosedError
            The runtime is closed.
        """
        here = replace(gang, follows=gang.follows_at(self.lanes.endpoint.worker))
        return self.lanes.holder.open_session(self.spec.engine, here)

    def abort(self, gang: int, reason: str) -> None:
        """End this worker's part in a gang, from any thread: all its members fail with ``reason``."""
        with self._lock:
            running = self.paused.get(gang) or self._gang
            if running is not None and running.gang.number == gang:
                running.abort(reason)
                if self._links is not None:
                    self._links.abort()
        self.lanes.holder.abort(self.spec.engine, gang, reason)

    def prefill(self, chunk: PrefillChunk) -> ChunkResult:
        """Compute a chunk of a prompt, on the home lane's thread.

        Returns
        -------
        ChunkResult
            With the first generated token (perhaps one that ends the sequence), when the chunk is the prompt's last.

        Raises
        ------
        ChannelError, GangAbortedError
            A holder failed, or the gang was aborted.
        PlanError
            The placement has no room for the chunk.
        StateLostError
            The state with which the chunk begins is not here.
        InvalidRequestError, ModelError
            No first token can be drawn.
        """
        return self.prefill_together([chunk])[0]

    def prefill_together(self, chunks: Sequence[PrefillChunk]) -> list[ChunkResult]:
        """Compute chunks of several prompts in one forward, asking holders in the first one's gang.

        They need no other holders, and each is in one span. An error of one, as in :meth:`prefill`, is an error of all;
        computing them again changes nothing.

        Returns
        -------
        list
            For each chunk what :meth:`prefill` returns.
        """
        model, gang, self.exchanged = self._loaded(), chunks[0].gang, Exchanged()
        together = Chunks(model, chunks)
        recording = span(self._ring, "chunk", gang.number, sum(len(chunk.tokens) for chunk in chunks))
        with self._showing(chunks) as showing, self._running(gang) as running, recording:
            run = self._runs().prefill(running, model, showing)
            try:
                together.compute(run, self.home_state)
            finally:
                self.exchanged = run.exchanged
        with torch.inference_mode(), self.pool.device.stream(Use.HOME):
            return together.results()

    def decode(self, window: DecodeWindow, batch: Sequence[SequenceState]) -> WindowResult:
        """Run a decode window over a batch, on the home lane's thread.

        Raises
        ------
        ChannelError, GangAbortedError
            A holder failed, or the gang was aborted.
        PlanError
            A placement has no room for its next token.
        StateLostError
            The state from which a sequence continues is not here.
        """
        model = self._loaded()
        with self._running(window.gang) as gang, span(self._ring, "window", window.gang.number, len(batch)):
            decoding = self._runs().decode(gang, model, batch)
            window = replace(window, steps=self.home_state.most_steps(window.steps))
            rows = (Begun(one.sequence, one.length, one.length + (window.steps or 0)) for one in batch)
            with self.home_state.change(model, rows) as change:
                speculator = None if self.speculation is None else self.speculation.begin_window(batch)
                result = decoding.run(window, change.past, speculator)
                change.after = decoding.ended()
            self.exchanged = result.exchanged
            return result

    def close(self) -> None:
        """End all gangs and sessions and close all channels. Can be called again."""
        with self._lock:
            self._closed = True
            if self._gang is not None:
                self._gang.abort("the engine was closed on this worker")
                if self._links is not None:
                    self._links.abort()
        self.lanes.holder.detach(self.spec.engine)
        with contextlib.suppress(EngineClosedError):  # closed lanes: no gang runs
            self.lanes.home.submit(_nothing).result()
        self.channels.close()
        if self._links is not None:
            self._links.close()

    def _loaded(self) -> LoadedModel:
        if self._model is None:
            raise ModelError("this worker only holds KV and has no model; send prompts to a worker that has one")
        return self._model

    def _runs(self) -> HomeRuns:
        steps = StepAttention(
            self.pool, self._loaded().geometry, self.home_state.windows, self.spec.config.deterministic, self._ring
        )
        steps.links = self._links
        return HomeRuns(steps, self._ring)

    @contextmanager
    def _showing(self, chunks: Sequence[PrefillChunk]) -> Iterator[Showing]:
        """Let later chunks follow these; GangAbortedError if one that they follow here failed."""
        gangs, here, lane = [chunk.gang for chunk in chunks], self.lanes.endpoint.worker, self.lanes.holder
        self._under_way.check_computed(earlier.gang for gang in gangs for earlier in gang.follows_at(here))
        numbers = [gang.number for gang in gangs]
        showing = Showing(numbers, self._under_way, lane, self.spec.engine, self.pool.device)
        try:
            yield showing
        except BaseException as error:
            showing.failed(in_words(error))
            raise
        showing.computed()

    @contextmanager
    def _running(self, gang: Gang) -> Iterator[HomeGang | PausedForward]:
        config = self.spec.config
        opened = gang, self.channels, config.timeout_start, config.timeout_receive
        running = self.paused.get(gang.number) or (
            HomeGang(*opened) if self._ring is None else TracedGang(self._ring, *opened)
        )
        with self._lock:
            if self._closed:
                raise EngineClosedError(f"engine {self.spec.engine} was closed on this worker")
            self._gang = running
        try:
            stages = contextlib.nullcontext() if self._links is None else self._links.serving(gang)
            with torch.inference_mode(), self.pool.device.stream(Use.HOME), running, stages:
                try:
                    yield running
                finally:
                    self.pool.device.finish()  # what is reported next has been written, and nothing is written later
        finally:
            with self._lock:
                self._gang = None


def _nothing() -> None:
    """Runs on a lane to show that all earlier calls have ended."""
