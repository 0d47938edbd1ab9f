"""Windows of KV at a home: as much as a layer sees, whatever the length of the sequence, or an error."""

from __future__ import annotations

import pytest
import torch
from _fakes import BLOCK_TOKENS, LONGEST_CHUNK, fleet, loaded, reference, state
from _models import WINDOWED, prompt_ids
from hypothesis import given
from hypothesis import strategies as st

from distkv_dask.config import Config
from distkv_dask.errors import CapacityError, StateLostError
from distkv_dask.geometry import Geometry, LayerKind
from distkv_dask.worker.blocks.pool import BlockShape, Pool
from distkv_dask.worker.home.windows import Windows, blocks_per_chunk, blocks_per_sequence, new_windows
from distkv_dask.worker.kv_memory import needs_of, rooms


@pytest.mark.parametrize("family", WINDOWED)
def test_a_long_sequence_takes_no_more_at_its_home_than_its_window(family: str) -> None:
    prompt, new = 300, 60
    with fleet(loaded(family), 2) as made:
        windows, geometry = made.members["w0"].runtime.home_state.windows, loaded(family).geometry
        assert windows is not None
        assert (geometry.window, len(geometry.far_layers)) == (40, 1)
        bound = blocks_per_sequence(geometry, BLOCK_TOKENS, LONGEST_CHUNK)
        placement = made.place(1, ("w1", 200), ("w0", prompt + new - 200))
        first = made.prefill(1, placement, prompt_ids(prompt), LONGEST_CHUNK, "w0")
        tokens, batch = [first], [state(1, placement, prompt, first, new - 1)]
        while batch:
            assert windows.pool.used_blocks <= bound < prompt // BLOCK_TOKENS
            result, batch = made.decode("w0", batch, 1000)
            assert result.steps <= windows.steps == 64
            tokens += result.tokens[1]
        made.release_sequence(1)
        assert windows.pool.used_blocks == 0
    assert tokens == reference(family, prompt, 0, new).tokens


@given(st.integers(0, 3), st.integers(1, 64), st.integers(1, 99), st.integers(1, 60), st.integers(1, 9), st.booleans())
def test_windows_and_blocks_fit_the_memory_of_a_home(
    near: int, window: int, chunk: int, blocks: int, batch: int, recurs: bool
) -> None:
    kinds = (LayerKind(),) * 2 + (LayerKind("sliding", window),) * near
    geometry = Geometry(len(kinds), 2, 1, 8, 10, 4 * window, "float32", kinds, state_bytes=999 * recurs)
    config = Config.load(block_tokens=BLOCK_TOKENS, prefill_chunk_tokens=chunk)
    needs = needs_of(geometry, config)
    assert bool(needs.each) == bool(geometry.home_bytes) == bool(near or recurs)
    block = BlockShape.of(geometry, BLOCK_TOKENS)
    assert block.layers == 2
    memory = needs.each + needs.once + blocks * block.nbytes
    found, places = rooms(memory, block, needs, batch)
    windows = new_windows(geometry, config, "home", places).pool.storage.nbytes if near else 0
    assert 1 <= places <= batch
    assert windows + places * 2 * geometry.state_bytes + found * block.nbytes <= memory
    if near:
        assert windows >= places * geometry.home_bytes - places * geometry.state_bytes
    with pytest.raises(CapacityError, match="one sequence need"):
        rooms(needs.each + needs.once + block.nbytes - 1, block, needs, batch)


kinds = st.builds(LayerKind, st.sampled_from(["sliding", "chunked"]), st.integers(1, 30))


class Kept:
    """Windows whose blocks contain the numbers of their tokens and sequences."""

    def __init__(self, near: list[LayerKind], block_tokens: int, chunk: int) -> None:
        kinds = (*near, LayerKind())
        self.geometry = Geometry(len(kinds), 1, 1, 8, 10, 0, "float32", kinds)
        each = blocks_per_sequence(self.geometry, block_tokens, chunk)
        shape = BlockShape.of(self.geometry, block_tokens, self.geometry.home_layers)
        self.each = each
        self.pool = Pool(shape, 2 * each + blocks_per_chunk(block_tokens, chunk))
        self.windows = Windows(self.geometry, self.pool, "home", chunk)

    def write(self, sequence: int, start: int, stop: int, value: int) -> None:
        for at in range(start, stop):
            size = self.pool.block_tokens
            (block,) = self.pool.find(sequence, [(at // size * size, at + 1)])
            self.pool.storage[block, ..., at % size, :] = value + at

    def check(self, sequence: int, length: int, value: int) -> None:
        """Check that everything is stored that the token at ``length`` sees."""
        size = self.pool.block_tokens
        for kind in self.geometry.layer_kinds[:-1]:
            for at in range(max(0, kind.first(length)), length):
                (block,) = self.pool.find(sequence, [(at // size * size, at + 1)])
                assert torch.all(self.pool.storage[block, ..., at % size, :] == value + at)


@given(
    st.lists(kinds, min_size=1, max_size=3),
    st.integers(1, 9),
    st.integers(1, 40),
    st.lists(st.tuples(st.floats(0, 1), st.booleans(), st.booleans()), max_size=20),
)
def test_what_is_seen_is_there_in_bounded_room_whatever_runs_again(
    near: list[LayerKind], block_tokens: int, chunk: int, runs: list[tuple[float, bool, bool]]
) -> None:
    kept = Kept(near, block_tokens, chunk)
    length = 0
    for part, decodes, again in runs:
        most = kept.windows.steps if decodes else chunk
        count = max(1, round(part * most))
        for value in (5000, 0) if again else (0,):  # values of a failed attempt are overwritten
            kept.windows.begin_run(1, length, length + most)
            kept.check(1, length, 0)
            kept.write(1, length, length + count, value)
            kept.windows.put(1, length + count)
            if value:
                kept.windows.begin_run(1, length, length + most)
        length += count
        assert kept.pool.used_blocks <= kept.each
        if not length % block_tokens:
            kept.windows.adopt(2, 1, length)
            kept.windows.begin_run(2, length, length + 1)
            kept.check(2, length, 0)
            kept.windows.drop(2)
    kept.windows.adopt(3, 1, length + 1)
    with pytest.raises(StateLostError, match="from its first token"):
        kept.windows.begin_run(3, length + 1, length + 2)
    kept.windows.drop(1)
    assert kept.pool.used_blocks == 0
