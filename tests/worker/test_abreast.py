"""Forwards abreast: stages have the next frame before they answer, in order; an error ends all of them in time."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distkv_dask.errors import ChannelError, GangAbortedError
from distkv_dask.gang import Gang, PrefillChunk
from distkv_dask.placement import Endpoint
from distkv_dask.sampling import SamplingParams
from distkv_dask.worker.channels.bodies import Row
from distkv_dask.worker.channels.frames import Header, Kind
from distkv_dask.worker.home.pooling import Pooling
from distkv_dask.worker.model.hook import attending_with
from distkv_dask.worker.plan import Part, Stored
from distkv_dask.worker.stages.abreast import Abreast
from distkv_dask.worker.stages.batches import decode_batch
from distkv_dask.worker.stages.links import Further, StageLinks, StageStep
from distkv_dask.worker.stages.parts import most_tokens, pieces_of, together

GANG = Gang("engine", 1, "one", 1, "home", ())
LIMIT = 20.0
ROW = Row(1, 0, 3, True, ((0, 8),), (0,))


class HandStage:
    """A channel to a stage that answers with hidden states one larger once it has ``least`` frames, or the ``last``."""

    is_duplex = True
    peer = "stage"

    def __init__(self, least: int = 1, last: int = 10**9) -> None:
        self.came: list[Header] = []
        self.batches: dict[int, tuple[int, ...]] = {}
        self.answers: queue.Queue[tuple[Header, bytes] | None] = queue.Queue()
        self._least, self._last = least, last
        self._waiting: list[tuple[Header, bytes]] = []

    def limit(self, seconds: float) -> None: ...

    def idle(self) -> bool:
        return True

    def send(self, header: Header, *buffers: Any) -> None:
        payload = b"".join(map(bytes, buffers))
        if header.kind is Kind.BATCH:
            batch = decode_batch(payload, 100)
            for number in batch.over:
                del self.batches[number]
            self.batches[header.layer] = batch.over
        elif header.kind is Kind.LAYERS:
            assert header.layer in self.batches
            self.came.append(header)
            self._waiting.append((header, payload[8 * 3 :]))
            while self._waiting and (len(self._waiting) >= self._least or len(self.came) == self._last):
                self.answer_one()

    def answer_one(self) -> None:
        header, states = self._waiting.pop(0)
        out = torch.frombuffer(bytearray(states), dtype=torch.float32) + 1
        self.answers.put((header._replace(kind=Kind.HIDDEN, length=len(states)), out.numpy().tobytes()))

    def recv_into(self, expected: Header, buffer: memoryview | None = None) -> None:
        if expected.kind is Kind.WELCOME:
            return
        answer = self.answers.get(timeout=LIMIT)
        if answer is None:
            raise ChannelError("the stage is gone")
        assert answer[0] == expected
        assert buffer is not None
        buffer[:] = answer[1]

    def abort(self) -> None:
        self.answers.put(None)

    def fail(self, gang: int, epoch: int, message: str) -> None: ...

    def close(self) -> None: ...


class Blocks:
    """A pool without blocks."""

    def find(self, *_: Any) -> list[int]:
        return []


def new_links(*channels: HandStage) -> StageLinks:
    stages = [Further(Endpoint(str(at), "host", 1), b"hello") for at in range(len(channels))]
    return StageLinks(stages, lambda endpoint, _: channels[int(endpoint.worker)], LIMIT)  # type: ignore[arg-type]


def forward(links: StageLinks, value: float, steps: int = 1) -> list[float]:
    """Steps of a forward that computes no layers of its own, of hidden states that begin with ``value``."""
    step: StageStep = links.step(GANG, 0, Blocks(), Part((ROW,), (0, 1, 2)), 3)  # type: ignore[arg-type]
    hidden, found = torch.full((1, 3, 4), value), []
    with attending_with(step, torch.arange(3), None):  # type: ignore[arg-type]
        for _ in range(steps):
            hidden = step.through(hidden)
            found.append(float(hidden.mean()))
            step.advance()
    step.close()
    return found


def test_a_stage_has_the_next_part_before_it_answers_and_all_stages_see_the_same_order() -> None:
    stages = HandStage(least=2, last=5), HandStage()
    links = new_links(*stages)
    calls: list[Callable[[], list[float]]] = [lambda at=at: forward(links, 10.0 * at) for at in range(5)]
    with links.serving(GANG):
        assert links.count == 3
        found = links.abreast.run(calls, links.break_off)
    assert found == [[10.0 * at + 2] for at in range(5)]
    orders = [[header.layer for header in stage.came] for stage in stages]
    assert orders[0] == orders[1] == [0, 1, 2, 3, 4]
    assert stages[0].answers.empty()
    links.close()


def test_parts_with_many_steps_take_turns_and_stages_forget_batches_that_are_over() -> None:
    stage = HandStage()
    links = new_links(stage)
    with links.serving(GANG):
        for _ in range(3):
            calls = [lambda at=at: forward(links, 100.0 * at, 4) for at in range(2)]
            found = links.abreast.run(calls, links.break_off)
            assert found == [[100.0 * at + done for done in (1, 2, 3, 4)] for at in range(2)]
    assert stage.batches.keys() <= {4, 5}
    assert [(header.layer, header.step) for header in stage.came if header.layer == 1] == [(1, at) for at in range(4)]
    links.close()


@pytest.mark.parametrize("where", ["stage", "home"])
def test_an_error_of_one_part_ends_all_parts_with_it(where: str) -> None:
    stage = HandStage(least=3)  # so all others wait for an answer
    links = new_links(stage)

    def broken() -> list[float]:
        if where == "stage":
            stage.answers.put(None)
            return forward(links, 1.0)
        raise ZeroDivisionError

    wrong = (ChannelError, GangAbortedError) if where == "stage" else ZeroDivisionError
    with pytest.raises(wrong), links.serving(GANG):
        links.abreast.run([lambda: forward(links, 0.0), broken, lambda: forward(links, 2.0)], links.break_off)
    assert links.lines == []
    links.close()


def test_an_abort_ends_what_waits_for_a_stage() -> None:
    stage = HandStage(least=2)
    links = new_links(stage)
    threading.Timer(0.2, links.abort).start()
    with pytest.raises((ChannelError, GangAbortedError)), links.serving(GANG):
        links.abreast.run([lambda: forward(links, 0.0)], links.break_off)
    links.close()


def test_over_a_channel_that_cannot_send_while_it_receives_there_is_one_part() -> None:
    stages = HandStage(), HandStage()
    links = new_links(*stages)
    stages[1].is_duplex = False
    with links.serving(GANG):
        assert links.count == 1
        assert links.abreast.run([lambda: forward(links, 1.0, 2)], links.break_off) == [[3.0, 5.0]]
    links.close()


def test_only_one_call_computes_at_a_time_and_first_turns_are_in_order() -> None:
    abreast, running, order = Abreast(4), [], []

    def call(number: int) -> int:
        order.append(number)
        for _ in range(20):
            running.append(number)
            assert len(running) == 1
            running.pop()
            with abreast.away():
                threading.Event().wait(0.001)
        return number

    calls = [lambda at=at: call(at) for at in range(6)]  # more than there are threads
    assert abreast.run(calls, lambda error: None) == [*range(6)]
    assert order == [*range(6)]
    abreast.close()


def chunk(sequence: int, start: int, size: int, targets: bool = False) -> PrefillChunk:
    wanted = tuple((at,) for at in range(size)) if targets else ()
    return PrefillChunk(GANG, sequence, (), start, tuple(range(size)), SamplingParams(), targets=wanted)


@given(st.lists(st.tuples(st.integers(1, 600), st.booleans()), min_size=1, max_size=6), st.integers(1, 5))
def test_parts_of_chunks_have_every_token_once_and_one_draws(sizes: list[tuple[int, bool]], count: int) -> None:
    chunks = [chunk(at, 7, size, targets) for at, (size, targets) in enumerate(sizes)]
    total = sum(size for size, _ in sizes)
    most = most_tokens(total, count)
    pieces = [piece for one in chunks for piece in pieces_of(one, most)]
    parts = together(pieces, most)
    assert [piece for part in parts for piece in part] == pieces
    assert all(sum(len(piece.tokens) for piece in part) <= most for part in parts)
    assert all(len({piece.sequence for piece in part}) == len(part) for part in parts)
    for one in chunks:
        mine = [piece for piece in pieces if piece.sequence == one.sequence]
        assert [mine[0].start, *(piece.stop for piece in mine[:-1])] == [piece.start for piece in mine]
        assert tuple(token for piece in mine for token in piece.tokens) == one.tokens
        assert tuple(target for piece in mine for target in piece.targets) == one.targets
        assert [piece.sampling is not None for piece in mine] == [False] * (len(mine) - 1) + [True]
    assert count > 1 or len(parts) == 1


@given(st.lists(st.tuples(st.integers(1, 600), st.integers(-1, 599)), min_size=1, max_size=6), st.integers(1, 5))
def test_hidden_states_that_parts_sum_are_those_of_the_wanted_tokens_of_each_chunk(
    sizes: list[tuple[int, int]], count: int
) -> None:
    """-1: no embedding of that chunk is wanted."""
    chunks = [
        replace(chunk(at, 7, size), pooled_from=None if first < 0 else 7 + min(first, size - 1))
        for at, (size, first) in enumerate(sizes)
    ]
    most = most_tokens(sum(size for size, _ in sizes), count)
    whole = Pooling(chunks)
    for part in together([piece for one in chunks for piece in pieces_of(one, most)], most):
        pooling = Pooling(part)
        take = pooling.step([Stored(one.sequence, (), one.start, len(one.tokens)) for one in part])
        if take is not None:
            take(torch.tensor([[one.sequence, at, 1.0] for one in part for at in range(one.start, one.stop)]))
        whole.add(pooling)
    for one, found in zip(chunks, whole.results(), strict=True):
        if one.pooled_from is None:
            assert found is None
        else:
            wanted = range(one.pooled_from, one.stop)
            assert found is not None
            assert found[:2] == (one.pooled_from, one.stop)
            assert np.frombuffer(found.sums, "<f8").tolist() == [one.sequence * len(wanted), sum(wanted), len(wanted)]
