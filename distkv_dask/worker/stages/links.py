"""The home's side of stages: hidden states go out, and come back after the stage's layers."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import zip_longest
from typing import NamedTuple

import torch

from distkv_dask.errors import GangAbortedError, in_words
from distkv_dask.gang import Exchanged, Gang
from distkv_dask.geometry import Geometry, LayerKind, describe_kinds
from distkv_dask.placement import Endpoint, Stage
from distkv_dask.worker.blocks.pool import Pool
from distkv_dask.worker.channels.base import Channel
from distkv_dask.worker.channels.bodies import Hello, encode_hello
from distkv_dask.worker.channels.frames import Header, Kind
from distkv_dask.worker.model.hook import running_positions
from distkv_dask.worker.plan import Part
from distkv_dask.worker.stages.abreast import Abreast
from distkv_dask.worker.stages.batches import StageBatch, encode_batch
from distkv_dask.worker.stages.line import AHEAD, Line


class Further(NamedTuple):
    """A further stage: where it listens, and the HELLO that greets it."""

    endpoint: Endpoint
    hello: bytes


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
        found.append(Further(endpoint, greeting))
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
        self.lines: list[Line] = []
        self.abreast = Abreast(AHEAD * (len(stages) + 1))
        """Runs forwards of a gang while stages compute others."""
        self._numbers = itertools.cycle(range(1 << 16))
        self._over: list[int] = []

    @property
    def count(self) -> int:
        """Forwards that all stages, the home among them, compute at the same time."""
        return len(self._stages) + 1 if all(line.channel.is_duplex for line in self.lines) else 1

    @contextmanager
    def serving(self, gang: Gang) -> Iterator[None]:
        """Keep channels open while a gang runs; after an error they are reopened, so that they contain nothing old.

        Raises
        ------
        ChannelError, GangAbortedError
            A stage cannot be reached, or does not know the engine.
        """
        try:
            if not all(line.channel.idle() for line in self.lines):
                self._close_channels()
            for stage in self._stages[len(self.lines) :]:
                channel = self._connect(stage.endpoint, self._limit)
                with self._lock:
                    self.lines = [*self.lines, Line(channel)]
                channel.limit(self._limit)
                channel.send(Header(Kind.HELLO, length=len(stage.hello)), stage.hello)
                channel.recv_into(Header(Kind.WELCOME))
            yield
        except BaseException as error:
            for line in self._detach_lines():
                line.channel.fail(gang.number, gang.epoch, in_words(error))
            raise

    def step(self, gang: Gang, step: int, pool: Pool, part: Part, tokens: int) -> StageStep:
        """Let the stages compute these rows from ``step`` on, over ``tokens`` tokens in each step."""
        blocks = tuple(tuple(pool.find(row.sequence, row.spans)) for row in part.rows)
        number, over = next(self._numbers), tuple(self._over)
        self._over.clear()
        header = Header(Kind.LAYERS, gang.number, gang.epoch, number, step)
        batch = encode_batch(StageBatch(part, tokens, blocks, over))
        return StageStep(self, header, batch, partial(self._over.append, number))

    def break_off(self, error: BaseException) -> None:
        """End all waits for stages, from any thread, because of an error."""
        with self._lock:
            for line in self.lines:
                line.break_off(error)

    def abort(self) -> None:
        """End all waits for stages, from any thread, because the gang is aborted."""
        self.break_off(GangAbortedError("it was aborted"))

    def close(self) -> None:
        """Close all channels, and end the threads."""
        self._close_channels()
        self.abreast.close()

    def _close_channels(self) -> None:
        for line in self._detach_lines():
            line.channel.close()

    def _detach_lines(self) -> list[Line]:
        with self._lock:
            lines, self.lines = self.lines, []
        return lines


class StageStep:
    """Sends hidden states of a batch's steps through the further stages.

    Parameters
    ----------
    links
        The channels to them.
    header
        Of the first step's frames to stages.
    batch
        Payload of the frame that tells them the batch.
    close
        Called when the batch has no more steps.
    """

    def __init__(self, links: StageLinks, header: Header, batch: bytes, close: Callable[[], None]) -> None:
        self._links = links
        self._lines = links.lines
        self._header = header
        self._batch: bytes | None = batch
        self.close = close
        self.exchanged = Exchanged()
        """What was exchanged so far."""

    def through(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states [1, T, size] after the layers of all further stages; the home computes others meanwhile.

        Raises
        ------
        ChannelError, GangAbortedError
            A stage failed.
        """
        began, sending = time.perf_counter(), 0.0
        out = torch.empty_like(hidden, memory_format=torch.contiguous_format)
        positions, states = _bytes(running_positions()), _bytes(hidden)
        place = self._lines[0].enter()
        with self._links.abreast.away():
            try:
                for line, after in zip_longest(self._lines, self._lines[1:]):
                    sending += self._send(line, place, positions, states)
                    states = _bytes(out)
                    with line.receiving(place) as channel:
                        channel.recv_into(self._header._replace(kind=Kind.HIDDEN, length=len(states)), states)
                        place = 0 if after is None else after.enter()  # so the order is the same there
            except BaseException as error:
                self._links.break_off(error)
                raise
        size, self._batch = len(self._lines) * len(states), None
        sent = size + len(self._lines) * len(positions)
        self.exchanged += Exchanged(sending, time.perf_counter() - began - sending, sent, size)
        return out

    def _send(self, line: Line, place: int, *payload: memoryview) -> float:
        """Send a step, and its batch before it if that is new; returns the seconds that it took."""
        header = self._header._replace(length=sum(map(len, payload)))
        with line.sending(place) as channel:
            began = time.perf_counter()
            if self._batch is not None:
                channel.send(header._replace(kind=Kind.BATCH, length=len(self._batch)), self._batch)
            channel.send(header, *payload)
            return time.perf_counter() - began

    def advance(self) -> None:
        """Advance to the next step, as the stages do."""
        self._header = self._header._replace(step=self._header.step + 1)


def _bytes(tensor: torch.Tensor) -> memoryview:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data
