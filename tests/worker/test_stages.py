"""Stages over every kind of channel give a home the results of their layers, compared with float64."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import msgpack
import pytest
import torch
from _channels import Bare, Way
from _fakes import TOKEN
from _peers import HEAD_DIM, HEADS, HELLO, KV_HEADS, Holder, gang, read
from torch import Tensor

from distkv_dask.errors import ChannelError, ChannelTimeoutError, GangAbortedError, PlanError
from distkv_dask.geometry import Geometry, LayerKind, describe_kinds
from distkv_dask.placement import Endpoint, Span, Stage
from distkv_dask.worker.blocks.pool import BlockShape, Pool
from distkv_dask.worker.channels.base import Channel
from distkv_dask.worker.channels.bodies import Row, decode_hello, encode_hello, token_digest
from distkv_dask.worker.channels.frames import Header, Kind
from distkv_dask.worker.holder.service import Limits, Service
from distkv_dask.worker.model.hook import attending_with
from distkv_dask.worker.plan import Part, Stored, cut
from distkv_dask.worker.stages.batches import StageBatch, decode_batch, encode_batch
from distkv_dask.worker.stages.blocks import NamedBlocks
from distkv_dask.worker.stages.links import Further, StageLinks, StageStep, further_stages
from distkv_dask.worker.stages.turns import StageTurns

LAYERS, SIZE, BLOCK = 5, HEADS * HEAD_DIM, 8
WHOLE = Geometry(LAYERS, HEADS, KV_HEADS, HEAD_DIM, 100, 512, "float32")
SPLIT = Stage(1, 2).layers(LAYERS)
SCALE = HEAD_DIM**-0.5


def layer(hidden: Tensor, positions: Tensor, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
    """One layer of a model without weights."""
    heads = hidden.view(-1, HEADS, HEAD_DIM)
    keys, values = (hidden + positions[:, None] / 50).view_as(heads), hidden.flip(1).view_as(heads)
    seen = attend(heads, keys[:, :KV_HEADS].contiguous(), values[:, :KV_HEADS].contiguous())
    return hidden / 2 + seen.reshape(hidden.shape)


class Model:
    """The layers of a further stage."""

    geometry, dtype, hidden_size = WHOLE, torch.float32, SIZE

    def further(self, hidden: Tensor, positions: Tensor, step: Any) -> Tensor:
        for number in range(*(at - SPLIT[0] for at in SPLIT)):
            hidden = layer(hidden, positions, lambda q, k, v, at=number: step.attend(at, q, k, v, SCALE))
        return hidden


def expected(hidden: Tensor) -> Tensor:
    """A whole sequence through the stage's layers: dense causal attention in float64."""

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (one.repeat_interleave(HEADS // KV_HEADS, 1) for one in (k, v))
        scores = torch.einsum("thd,shd->hts", q, k) * SCALE
        later = torch.ones(len(q), len(q)).triu(1).bool()
        return torch.einsum("hts,shd->thd", scores.masked_fill(later, -torch.inf).softmax(-1), v)

    hidden = hidden.double()
    for _ in range(*SPLIT):
        hidden = layer(hidden, torch.arange(len(hidden)), dense)
    return hidden


class Home:
    """A home with its own pool of blocks, whose ids it sends to the stage."""

    def __init__(self, links: StageLinks) -> None:
        self.links = links
        self.pool = Pool(BlockShape(SPLIT[0], KV_HEADS, HEAD_DIM, "float32", BLOCK), 16)

    def part(self, *stored: tuple[int, int, int]) -> Part:
        """The home's part of a batch of sequences, given as (sequence, length, new tokens)."""
        rows = []
        for sequence, length, new in stored:
            self.pool.reserve(sequence, 0, length + new)
            room = -(-(length + new) // BLOCK) * BLOCK
            rows.append(Stored(sequence, (Span("home", 0, room),), length, new))
        return cut(rows)["home"]

    def step(self, number: int, *stored: tuple[int, int, int]) -> StageStep:
        part = self.part(*stored)
        return self.links.step(gang(number), 0, self.pool, part, sum(new for _, _, new in stored))


def through(home: Home, step: StageStep, hidden: Tensor, positions: list[int]) -> Tensor:
    def forward() -> Tensor:
        with attending_with(step, torch.tensor(positions), WHOLE):  # type: ignore[arg-type]
            return step.through(hidden[None])[0]

    return home.links.abreast.run([forward], home.links.break_off)[0]


def open_to(lane: Holder) -> Callable[[Endpoint, float], Channel]:
    return lambda endpoint, seconds: lane.open()


def compute(home: Home, number: int, hidden: Tensor, tokens: int | None = None) -> Tensor:
    """Run a gang for a new sequence's first tokens; ``tokens`` is the announced number, if it differs."""
    with home.links.serving(gang(number)):
        step = home.step(number, (1, 0, tokens or len(hidden)))
        return through(home, step, hidden, [*range(len(hidden))])


def ask(home: Home, number: int, header: Header, body: bytes = b"") -> None:
    """Run a gang that sends one frame and waits for hidden states."""
    with home.links.serving(gang(number)):
        channel = home.links.lines[0].channel
        channel.send(header._replace(gang=number, epoch=1, length=len(body)), body)
        channel.recv_into(Header(Kind.HIDDEN, number, 1))


@pytest.fixture
def lane(way: Way) -> Iterator[Holder]:
    lane = Holder(way)
    pool = NamedBlocks(BlockShape(SPLIT[1] - SPLIT[0], KV_HEADS, HEAD_DIM, "float32", BLOCK), 16)
    service = Service("engine", TOKEN.encode(), pool, Limits(20.0, 20.0))
    service.turns = StageTurns(Model(), pool)  # type: ignore[arg-type]
    lane.attach(service)
    yield lane
    lane.close()


@contextmanager
def linked(opened: Callable[[], Channel], limit: float = 20.0, token: str = TOKEN) -> Iterator[tuple[Home, list[int]]]:
    """A home with one further stage, and the number of its connections."""
    count: list[int] = []

    def connect(endpoint: Endpoint, seconds: float) -> Channel:
        assert (endpoint.worker, seconds) == ("w1", limit)
        count.append(1)
        return opened()

    first = Stage(0, 2, (Endpoint("w1", "127.0.0.1", 1),))
    links = StageLinks(further_stages(first, WHOLE, token.encode(), HELLO), connect, limit)
    yield Home(links), count
    links.close()
    assert links.lines == []


@pytest.fixture
def home(lane: Holder) -> Iterator[Home]:
    with linked(lane.open) as (home, _):
        yield home


def test_a_prompt_and_a_batch_through_a_stage_are_as_in_one_process(home: Home) -> None:
    torch.manual_seed(1)
    one, two = torch.randn(23, SIZE), torch.randn(14, SIZE)
    with home.links.serving(gang(1)):
        first = through(home, home.step(1, (1, 0, 20)), one[:20], [*range(20)])
        second = through(home, home.step(1, (2, 0, 11)), two[:11], [*range(11)])
        step = home.step(1, (1, 20, 1), (2, 11, 1))
        later = []
        for at in range(3):
            later.append(through(home, step, torch.stack((one[20 + at], two[11 + at])), [20 + at, 11 + at]))
            step.advance()
    for found, whole in (((first, 0), one), ((second, 1), two)):
        chunk, row = found
        all_of_it = torch.cat((chunk, *(batch[row : row + 1] for batch in later)))
        torch.testing.assert_close(all_of_it.double(), expected(whole), rtol=0, atol=2e-5)
    assert step.exchanged.sent_bytes == 3 * 2 * (8 + 4 * SIZE)
    assert step.exchanged.received_bytes == 3 * 2 * 4 * SIZE
    assert min(step.exchanged.sending, step.exchanged.waiting) > 0


def test_a_sequence_whose_blocks_moved_to_others_is_found_where_they_are_now(home: Home) -> None:
    torch.manual_seed(2)
    hidden, other = torch.randn(9, SIZE), torch.randn(24, SIZE)
    with home.links.serving(gang(1)):
        through(home, home.step(1, (5, 0, 24)), other, [*range(24)])
        home.pool.release_sequence(5)
        through(home, home.step(1, (6, 0, 8)), other[:8], [*range(8)])  # the first of these blocks is reused
        found = [through(home, home.step(1, (5, 0, 8)), hidden[:8], [*range(8)])]
        found.append(through(home, home.step(1, (5, 8, 1)), hidden[8:], [8]))
    assert set(home.pool.table(5)).isdisjoint(home.pool.table(6))
    torch.testing.assert_close(torch.cat(found).double(), expected(hidden), rtol=0, atol=2e-5)


def test_gangs_share_a_connection_until_one_of_them_fails(lane: Holder) -> None:
    with linked(lane.open) as (home, count):
        for number in (1, 2):
            compute(home, number, torch.randn(3, SIZE))
        assert len(count) == 1
        with pytest.raises(ZeroDivisionError), home.links.serving(gang(3)):
            raise ZeroDivisionError
        assert home.links.lines == []
        assert len(compute(home, 4, torch.randn(3, SIZE))) == 3
    assert len(count) == 2


def test_answers_that_a_gang_left_unread_are_never_taken_for_those_of_a_later_one(lane: Holder) -> None:
    torch.manual_seed(3)
    hidden = torch.randn(3, SIZE)
    with linked(lane.open) as (home, count):
        with home.links.serving(gang(1)):
            step, channel = home.step(1, (1, 0, 3)), home.links.lines[0].channel
            header, batch = step._header._replace(length=3 * (8 + 4 * SIZE)), step._batch
            assert batch is not None
            channel.send(header._replace(kind=Kind.BATCH, length=len(batch)), batch)
            channel.send(header, bytes(header.length))
            pause = threading.Event()
            while channel.idle():  # until the answer has arrived
                pause.wait(0.01)
        found = compute(home, 2, hidden)
    torch.testing.assert_close(found.double(), expected(hidden), rtol=0, atol=2e-5)
    assert len(count) == 2


@pytest.mark.parametrize("layers", [2, 4])
def test_a_stage_of_another_cut_is_refused_with_both_geometries(lane: Holder, layers: int) -> None:
    hello = HELLO._replace(layers=layers, layer_kinds=f"a=full; {'a' * layers}")
    links = StageLinks([Further(Endpoint("w1", "", 1), encode_hello(TOKEN.encode(), hello))], open_to(lane), 20.0)
    said = rf"\({layers}, 2, 64, .*this holder has engine engine, \(3, 2, 64, 'float32', 'a=full; aaa'"
    with pytest.raises(GangAbortedError, match=said), links.serving(gang(1)):
        pass
    assert links.lines == []


def test_a_home_without_the_token_reaches_no_stage(lane: Holder) -> None:
    with linked(lane.open, token="another") as (home, _), pytest.raises(ChannelError), home.links.serving(gang(1)):
        pass


def test_a_stage_says_what_it_does_not_expect_and_serves_the_next_home(lane: Holder) -> None:
    with linked(lane.open) as (home, count):
        for number, kind in enumerate((Kind.LAYERS, Kind.BEGIN, Kind.ATTEND, Kind.END), start=1):
            with pytest.raises(GangAbortedError, match=rf"sent {kind.name} .*a stage does not expect here"):
                ask(home, number, Header(kind))
        with pytest.raises(GangAbortedError, match=rf"{3 * (8 + 4 * SIZE)} bytes were expected"):
            compute(home, 5, torch.randn(2, SIZE), tokens=3)
        assert len(compute(home, 6, torch.randn(3, SIZE))) == 3
    assert len(count) == 6


def test_frames_of_an_earlier_connection_change_nothing_any_more(lane: Holder) -> None:
    torch.manual_seed(4)
    hidden = torch.randn(3, SIZE)
    with linked(lane.open) as (earlier, _), linked(lane.open) as (home, _), earlier.links.serving(gang(1)):
        late = earlier.step(1, (1, 0, 3))
        through(earlier, late, torch.randn(3, SIZE), [0, 1, 2])
        with home.links.serving(gang(2)):
            found = through(home, home.step(2, (1, 0, 2)), hidden[:2], [0, 1])
            with pytest.raises(GangAbortedError, match="opened another channel to this stage since"):
                through(earlier, late, torch.randn(3, SIZE), [0, 1, 2])
            after = through(home, home.step(2, (1, 2, 1)), hidden[2:], [2])
    torch.testing.assert_close(torch.cat((found, after)).double(), expected(hidden), rtol=0, atol=2e-5)


def test_a_row_without_room_in_the_blocks_that_the_home_names_is_a_fault_of_the_plan(lane: Holder) -> None:
    with linked(lane.open) as (home, _):
        part = home.part((7, 0, 9))
        body = encode_batch(StageBatch(part, 9, (home.pool.table(7)[:1],)))
        with pytest.raises(PlanError, match="of sequence 7 were planned on this worker, which has no") as caught:
            ask(home, 1, Header(Kind.BATCH), body)
    assert caught.value.sequence == 7


@pytest.fixture
def frozen(way: Way) -> Iterator[Callable[[], Channel]]:
    """Opens channels to a stage that accepts its home and then does nothing."""
    if way.encrypted or way.channel == "ucx":
        pytest.skip("how long a call waits is not theirs to decide")
    server, stop = Bare(way), threading.Event()

    def freeze() -> None:
        with server.accept() as peer:
            read(peer)
            peer.sendall(Header(Kind.WELCOME).pack())
            stop.wait(30)

    thread = threading.Thread(target=freeze)
    thread.start()
    yield lambda: way.open(server.endpoint)
    stop.set()
    thread.join()
    server.close()


def test_a_stage_that_does_not_answer_is_given_up_after_the_limit(frozen: Callable[[], Channel]) -> None:
    with linked(frozen, limit=0.3) as (home, _):
        with pytest.raises(ChannelTimeoutError, match=r"HIDDEN .*within 0.3 s.*distkv.timeouts.receive"):
            compute(home, 1, torch.randn(3, SIZE))
        assert home.links.lines == []


def test_a_call_that_waits_for_a_stage_can_be_ended_by_another_thread(frozen: Callable[[], Channel]) -> None:
    with linked(frozen) as (home, _):
        ending = threading.Timer(0.1, home.links.abort)
        ending.start()
        with pytest.raises(ChannelError):
            compute(home, 1, torch.randn(3, SIZE))
        ending.join()
        assert home.links.lines == []


@pytest.mark.parametrize("count", [2, 3, 5])
def test_further_stages_together_have_all_layers_after_the_homes_once(count: int) -> None:
    kinds = tuple(LayerKind("sliding", 4 + at) for at in range(7))
    whole = replace(WHOLE, layers=7, layer_kinds=kinds)
    endpoints = tuple(Endpoint(f"w{at}", "", at) for at in range(1, count))
    found = further_stages(Stage(0, count, endpoints), whole, b"token", HELLO)
    assert [one.endpoint for one in found] == [*endpoints]
    hellos = [decode_hello(one.hello) for one in found]
    assert all(one.hello.startswith(token_digest(b"token")) for one in found)
    for number, hello in enumerate(hellos, start=1):
        first, stop = Stage(number, count).layers(7)
        assert hello.layers == stop - first > 0
        assert hello == HELLO._replace(layers=stop - first, layer_kinds=describe_kinds(kinds[first:stop]))


ROWS = (Row(1, 0, 3, True, ((0, 8),), (0,)), Row(2, 8, 1, True, ((0, 16),), (8,)))
BATCH = StageBatch(Part(ROWS, (0, 1, 2, 3)), 4, ((3,), (5, 0)))


def body(
    tokens: Any = 4, places: Any = (0, 1, 2, 3), blocks: Any = ((3,), (5, 0)), rows: Any = ROWS, over: Any = ()
) -> bytes:
    packed: bytes = msgpack.packb([tokens, places, blocks, msgpack.packb(rows), over])
    return packed


def test_a_batch_arrives_as_it_was_sent() -> None:
    shared = Part((*ROWS, Row(3, 8, 2, False, ((0, 8),), (9, 4))), (0, 1, 2, 3, 3, 2))
    for batch in (BATCH, StageBatch(shared, 4, ((3,), (5, 0), (7,)), (65535, 0))):
        assert decode_batch(encode_batch(batch), 8) == batch
    assert encode_batch(BATCH) == body()


REFUSED = [
    b"", b"\xc1", msgpack.packb(4), msgpack.packb([4, [0, 1, 2, 3], []]),  # no batch at all
    body(blocks=((8,), (5, 0))), body(blocks=((-1,), (5, 0))), body(blocks=((True,), (5, 0))),  # no such block
    body(blocks=((3,),)), body(blocks=3), body(blocks=(3, 5)), body(rows=ROWS[:1]),  # not one list for each row
    body(places=(0, 1, 2)), body(places=(0, 1, 2, 4)), body(places=(0, 1, 2, -1)), body(places=(0, 1, 2, 3.0)),
    body(places=2), body(tokens=3), body(tokens=4.0), body(tokens=True), body(tokens="4"),
    body(tokens=5), body(tokens=2**40), body(tokens=2**63), body(tokens=-1),  # numbers of tokens that no row has
    body(over=3), body(over=("1",)), body(over=(True,)),
    body(tokens=0, places=(), blocks=(), rows=()), body(rows=[[1, 0, 3, True, [], []]]),
]  # fmt: skip


@pytest.mark.parametrize("sent", REFUSED, ids=range(len(REFUSED)))
def test_a_batch_that_does_not_fit_together_is_refused_before_anything_is_allocated(sent: bytes) -> None:
    with pytest.raises(ChannelError, match="batch"):
        decode_batch(sent, 8)


def test_only_sequences_of_the_batch_under_way_have_blocks() -> None:
    pool = NamedBlocks(BlockShape(1, 1, 8, "float32", BLOCK), 8)
    pool.name_blocks([(1, ((0, 16), (24, 32)), (3, 5, 6)), (2, ((8, 16),), (3,)), (1, ((32, 40),), (7,))])
    assert (pool.table(1), pool.table(2)) == ((3, 5, 6, 7), (3,))
    assert pool.find(1, [(24, 40)]) == [6, 7]
    pool.name_blocks([(2, ((0, 8),), (1,))])
    assert (pool.table(1), pool.table(2)) == ((), (1,))
    with pytest.raises(PlanError, match="sequence 1 "):
        pool.find(1, [(0, 8)])
