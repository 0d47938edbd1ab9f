"""KV memory that a worker gives an engine: what was requested, or what is left, or a refusal with both numbers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distkv_dask.config import Config
from distkv_dask.errors import CapacityError, ConfigError, DeviceError
from distkv_dask.geometry import Geometry
from distkv_dask.messages.names import KV_MEMORY_RESOURCE, EngineSpec
from distkv_dask.worker import kv_memory as module
from distkv_dask.worker import weight_memory
from distkv_dask.worker.blocks.pool import BlockShape
from distkv_dask.worker.device import HOST, Device, Peak
from distkv_dask.worker.kv_memory import Needs, host_memory, kv_memory, rooms

BLOCK = BlockShape(2, 1, 8, "float32", 8)
GIB = 1 << 30
RESIDENT = GIB // 2
"""Bytes that the process uses."""


@pytest.fixture(autouse=True)
def resident(monkeypatch: pytest.MonkeyPatch) -> None:
    process: Any = SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=RESIDENT))
    monkeypatch.setattr(module.psutil, "Process", lambda: process)
    monkeypatch.setattr(weight_memory.psutil, "Process", lambda: process)


def spec(**settings: Any) -> EngineSpec:
    return EngineSpec("engine", "tiny", "float32", "a token", Config.load(**settings))


def worker(limit: int | None = 10 * GIB, **resources: int) -> Any:
    return SimpleNamespace(
        address="tcp://w0",
        memory_manager=SimpleNamespace(memory_limit=limit),
        state=SimpleNamespace(total_resources={name: float(value) for name, value in resources.items()}),
    )


class Card(Device):
    """A card with this much free memory, of which a prompt chunk takes a part, or too much."""

    def __init__(self, free: int, total: int = 80 * GIB, chunk: int = GIB, fits: bool = True) -> None:
        super().__init__()
        self.name, self._memory, self.chunk, self.fits = "H200", (free, total), chunk, fits

    @property
    def is_host(self) -> bool:
        return False

    def memory(self) -> tuple[int, int]:
        return self._memory

    @contextmanager
    def peak(self) -> Iterator[Peak]:
        found = Peak()
        yield found
        if not self.fits:
            raise torch.OutOfMemoryError("CUDA out of memory")
        found.bytes = self.chunk


class Model:
    """Records how many tokens were computed to measure the memory of a chunk."""

    def __init__(self, longest: int = 0, weights: int = GIB) -> None:
        self.geometry = Geometry(2, 1, 1, 8, 10, longest, "float32")
        self.weight_bytes = weights
        self.computed: list[tuple[int, list[int]]] = []

    def forward(self, ids: torch.Tensor, positions: torch.Tensor, attention: Any, keep: torch.Tensor) -> None:
        assert positions.tolist() == list(range(len(ids)))
        self.computed.append((len(ids), keep.tolist()))


def found(
    settings: dict[str, Any],
    at: Any = None,
    device: Device = HOST,
    model: Model | None = None,
    block: BlockShape = BLOCK,
) -> int:
    return kv_memory(spec(**settings), at or worker(), block, device, model)  # type: ignore[arg-type]


# On the host


def test_what_is_asked_for_is_given_and_a_workers_own_resource_goes_before() -> None:
    assert found({"kv_memory": GIB}) == GIB
    assert found({"kv_memory": GIB}, worker(**{KV_MEMORY_RESOURCE: 3 * GIB})) == 3 * GIB
    assert found({"kv_memory": None}, worker(**{KV_MEMORY_RESOURCE: 3 * GIB})) == 3 * GIB


@pytest.mark.parametrize("model", [None, Model(weights=2 * GIB)])
def test_half_of_what_weights_leave_is_the_default(model: Model | None) -> None:
    left = 10 * GIB - (0 if model is None else model.weight_bytes)
    assert found({"kv_memory": None}, model=model) == left // 2


def test_a_worker_without_a_limit_must_be_told() -> None:
    with pytest.raises(ConfigError, match="tcp://w0 has no memory limit to take half of: give kv_memory"):
        found({"kv_memory": None}, worker(None))
    assert found({"kv_memory": 99 * GIB}, worker(None)) == 99 * GIB, "nobody pauses it"


def test_what_would_pause_the_worker_is_refused_to_the_byte() -> None:
    room = int(0.8 * 10 * GIB) - RESIDENT
    assert found({"kv_memory": room}) == room
    with pytest.raises(CapacityError, match=rf"kv_memory of {room + 1} bytes does not fit.*holds {RESIDENT} bytes"):
        found({"kv_memory": room + 1})


def test_less_than_a_block_is_refused_with_both_sizes() -> None:
    assert found({"kv_memory": BLOCK.nbytes}) == BLOCK.nbytes
    words = rf"kv_memory is {BLOCK.nbytes - 1} bytes, but one block of 8 tokens of this model needs {BLOCK.nbytes}"
    with pytest.raises(CapacityError, match=words):
        found({"kv_memory": BLOCK.nbytes - 1})


# On a card


def test_a_card_gives_what_a_chunk_and_a_margin_leave() -> None:
    card, model = Card(60 * GIB), Model()
    assert found({"kv_memory": None}, device=card, model=model) == 60 * GIB - GIB - 4 * GIB
    assert found({"kv_memory": None}, device=card) == 60 * GIB - 4 * GIB, "a memory worker computes no chunks"


@pytest.mark.parametrize(("longest", "tokens"), [(0, 512), (4096, 512), (100, 100)])
def test_the_largest_chunk_is_computed_and_no_larger_one(longest: int, tokens: int) -> None:
    model = Model(longest)
    found({"kv_memory": None, "prefill_chunk_tokens": 512}, device=Card(60 * GIB), model=model)
    assert model.computed == [(tokens, [tokens - 1])]


def test_what_is_asked_of_a_card_must_fit_beside_a_chunk() -> None:
    card, model = Card(10 * GIB), Model()
    assert found({"kv_memory": 9 * GIB}, device=card, model=model) == 9 * GIB
    with pytest.raises(DeviceError, match=rf"does not fit H200.*a prompt chunk of 512 tokens needs {GIB} of them"):
        found({"kv_memory": 9 * GIB + 1, "prefill_chunk_tokens": 512}, device=card, model=model)
    with pytest.raises(DeviceError, match=r"does not fit H200: \d+ of its \d+ bytes are free\. Lower"):
        found({"kv_memory": 11 * GIB}, device=card)


def test_a_card_that_is_full_says_what_to_look_for() -> None:
    with pytest.raises(DeviceError, match="Is another engine or worker on this card"):
        found({"kv_memory": None}, device=Card(4 * GIB + BLOCK.nbytes - 1))
    assert found({"kv_memory": None}, device=Card(4 * GIB + BLOCK.nbytes)) == BLOCK.nbytes


def test_a_chunk_that_does_not_fit_is_not_a_failure_of_torch() -> None:
    with pytest.raises(DeviceError, match=r"a prompt chunk of 512 tokens does not fit H200.*chunk-tokens") as caught:
        found({"prefill_chunk_tokens": 512}, device=Card(GIB, fits=False), model=Model())
    assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)


# Host memory for blocks that leave a card


@pytest.mark.parametrize(
    ("asked", "limit", "given"),
    [
        (None, 10 * GIB, 10 * GIB // 4),
        (None, None, 0),
        (7, None, 7),
        (GIB, 10 * GIB, GIB),
        (None, RESIDENT, 0),
        (None, GIB, min(GIB // 4, int(0.8 * GIB) - RESIDENT)),
    ],
)
def test_host_memory_is_a_quarter_or_what_is_free(asked: int | None, limit: int | None, given: int) -> None:
    assert host_memory(spec(host_memory=asked), worker(limit), Card(GIB)) == given


def test_host_memory_that_would_pause_the_worker_is_refused() -> None:
    room = int(0.8 * 10 * GIB) - RESIDENT
    assert host_memory(spec(host_memory=room), worker(), Card(GIB)) == room
    with pytest.raises(CapacityError, match=rf"{room} bytes are free up to where Dask pauses it \(80%"):
        host_memory(spec(host_memory=room + 1), worker(), Card(GIB))
    with pytest.raises(CapacityError, match="0 bytes are free"):
        host_memory(spec(host_memory=1), worker(RESIDENT), Card(GIB))


def test_a_pool_in_host_memory_has_no_host_tier() -> None:
    assert host_memory(spec(host_memory=GIB), worker(), HOST) == 0


# Blocks and places


@given(st.integers(0, 10**6), st.integers(0, 5000), st.integers(0, 5000), st.floats(0, 1), st.integers(1, 64))
def test_places_take_no_more_than_their_share_unless_it_is_the_first(
    memory: int, each: int, once: int, share: float, batch: int
) -> None:
    needs, size = Needs(each, once, share), BLOCK.nbytes
    fitting = [count for count in range(1, batch + 1) if count * each + once <= int(share * memory)]
    expected = (max(fitting, default=1)) if each else batch
    left = memory - expected * each - once
    if left < size:
        with pytest.raises(CapacityError, match=f"need {each + once} bytes and one block of 8 tokens {size}"):
            rooms(memory, BLOCK, needs, batch)
    else:
        assert rooms(memory, BLOCK, needs, batch) == (left // size, expected)
