"""The home's side of stages: hidden states go out, and come back after the stage's layers."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch

from distkv_dask.errors import in_words
from distkv_dask.gang import Exchanged, Gang
from distkv_dask.geometry import Geometry, LayerKind, describe_kinds
from distkv_dask.placement import Endpoint, Stage
from distkv_dask.worker.blocks.pool import Pool
from distkv_dask.worker.channels.base import Channel
from distkv_dask.worker.channels.bodies import Hello, encode_hello
from distkv_dask.worker.channels.frames import Header, Kind
from distkv_dask.worker.model.hook import running_positions
from distkv_dask.worker.plan import Part
from distkv_dask.worker.stages.batches import encode_batch


class Further(NamedTuple):
    """A further stage: where it listens, the HELLO that greets it, and its first layer."""

    endpoint: Endpoint
    hello: bytes
    first_layer: int


def further_stages(first: Stage, whole: Geometry, token: bytes, hello: Hello) -> list[Further]:
    """The further stages of a model.

    Parameters
    ----------
    first
        The home's stage.
    whole
        Sizes of the model with all its layers.
    token, hello
        What the home sends to holders.
    """
    found = []
    for number, endpoint in enumerate(first.further, start=1):
        start, stop = Stage(number, first.count).layers(whole.layers)
        kinds = describe_kinds(whole.layer_kinds[start:stop] or (LayerKind(),) * (stop - start))
        greeting = encode_hello(token, hello._replace(layers=stop - start, layer_kinds=kinds))
        found.append(Further(endpoint, greeting, start))
    return found


class StageLinks:
    """Channels to the further stages, kept between gangs; used by the home lane's thread, except :meth:`abort`.

    Parameters
    ----------
    stages
        The further stages, in order.
    connect
        Connects to a worker within a number of seconds.
    limit
        Seconds of silence of a stage.
    """

    def __init__(self, stages: Sequence[Further], connect: Callable[[Endpoint, float], Channel], limit: float) -> None:
        self._stages = stages
        self._connect = connect
        self._limit = limit
        self._lock = threading.Lock()
        self.channels: list[Channel] = []

    @contextmanager
    def serving(self, gang: Gang) -> Iterator[None]:
        """Keep channels open while a gang runs; after an error they are reopened, so that they contain nothing old.

        Raises
        ------
        ChannelError, GangAbortedError
            A stage cannot be reached, or does not know the engine.
        """
        try:
            if not all(channel.idle() for channel in self.channels):
                self.close()
            for stage in self._stages[len(self.channels) :]:
                channel = self._connect(stage.endpoint, self._limit)
                with self._lock:
                    self.channels = [*self.channels, channel]
                channel.limit(self._limit)
                channel.send(Header(Kind.HELLO, length=len(stage.hello)), stage.hello)
                channel.recv_into(Header(Kind.WELCOME))
            yield
        except BaseException as error:
            for channel in self._detach_channels():
                channel.fail(gang.number, gang.epoch, in_words(error))
            raise

    def step(self, gang: Gang, step: int, pool: Pool, part: Part, tokens: int) -> StageStep:
        """Let the stages compute these rows from ``step`` on, over ``tokens`` tokens in each step."""
        body = encode_batch(part, tokens, [pool.find(row.sequence, row.spans) for row in part.rows])
        header = Header(Kind.BATCH, gang.number, gang.epoch, 0, step, len(body))
        for channel in self.channels:
            channel.send(header, body)
        layers = [stage.first_layer for stage in self._stages]
        return StageStep(self.channels, layers, Header(Kind.LAYERS, gang.number, gang.epoch, 0, step))

    def abort(self) -> None:
        """End a call that waits for a stage, from another thread."""
        with self._lock:
            for channel in self.channels:
                channel.abort()

    def close(self) -> None:
        """Close all channels."""
        for channel in self._detach_channels():
            channel.close()

    def _detach_channels(self) -> list[Channel]:
        with self._lock:
            channels, self.channels = self.channels, []
        return channels


class StageStep:
    """Sends hidden states of a batch's steps through the further stages.

    Parameters
    ----------
    channels, layers
        To each stage, and the number of its first layer.
    header
        Of the first step's frames.
    """

    def __init__(self, channels: Sequence[Channel], layers: Sequence[int], header: Header) -> None:
        self._channels = channels
        self._layers = layers
        self._header = header
        self.exchanged = Exchanged()
        """What was exchanged so far."""

    def through(self, stage: int, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states [1, T, size] after the layers of stage ``stage``, counted from 1.

        Raises
        ------
        ChannelError, GangAbortedError
            The stage failed.
        """
        began, channel, header = time.perf_counter(), self._channels[stage - 1], self._header
        sent = _bytes(running_positions()), _bytes(hidden)
        length = sum(map(len, sent))
        header = header._replace(layer=self._layers[stage - 1], length=length)
        channel.send(header, *sent)
        asked = time.perf_counter()
        out = torch.empty_like(hidden, memory_format=torch.contiguous_format)
        into = _bytes(out)
        channel.recv_into(header._replace(kind=Kind.HIDDEN, length=len(into)), into)
        self.exchanged += Exchanged(asked - began, time.perf_counter() - asked, length, len(into))
        return out

    def advance(self) -> None:
        """Advance to the next step, as the stages do."""
        self._header = self._header._replace(step=self._header.step + 1)


def _bytes(tensor: torch.Tensor) -> memoryview:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data
