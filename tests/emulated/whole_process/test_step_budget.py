"""A step's operations on a card with Triton's kernels: waits, launches and copies, by placement of the KV."""

from __future__ import annotations

from collections.abc import Iterator

import emulated
import pytest
from _fakes import Fleet, fleet, reference, state
from _models import model_dir, prompt_ids
from _thorough import some_of

from distkv_dask.kernels import dispatch, triton_kernel
from distkv_dask.worker.device_choice import choose_device
from distkv_dask.worker.model.load import load_model
from distkv_dask.worker.model.loaded import LoadedModel

PROMPT, STEPS, NEW = 20, 4, 7
SPLITS = {
    "local": (("w0", 48),),
    "one holder": (("w1", 16), ("w0", 32)),
    "two holders": (("w1", 8), ("w2", 8), ("w0", 32)),
    "tail at a holder": (("w0", 16), ("w1", 32)),
}


@pytest.fixture(scope="module", autouse=True)
def triton(monkeypatch_module: pytest.MonkeyPatch) -> None:
    monkeypatch_module.setattr(triton_kernel, "unsupported", lambda *case: None)
    dispatch.choose.cache_clear()


@pytest.fixture(scope="module")
def monkeypatch_module() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        yield patch
    dispatch.choose.cache_clear()


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return load_model(str(model_dir("qwen3")), "float32", 1, device=choose_device("cuda"))


def decoded(made: Fleet, split: str) -> tuple[list[int], emulated.Counts]:
    """The tokens of a few steps, and the counts of the last ones."""
    placement = made.place(1, *SPLITS[split])
    first = made.prefill(1, placement, prompt_ids(PROMPT), PROMPT, "w0")
    result, batch = made.decode("w0", [state(1, placement, PROMPT, first, NEW)], 2)
    tokens = [first, *result.tokens[1]]
    with emulated.counting() as counts:
        result, _ = made.decode("w0", batch, STEPS)
    return tokens + result.tokens[1], counts


def at(counts: emulated.Counts, kind: str, lane: str, *files: str) -> int:
    """Number of operations of a kind on a lane that these files asked for."""
    rows = counts.number.items()
    return sum(n for one, n in rows if one.kind == kind and lane in one.thread and one.place.startswith(files))


@pytest.mark.parametrize("split", some_of(SPLITS, "local", "one holder"))
def test_a_decode_step_has_few_stops_and_launches(model: LoadedModel, split: str) -> None:
    layers = model.geometry.layers
    with fleet(model, 3) as made:
        tokens, counts = decoded(made, split)
    assert tokens == reference("qwen3", PROMPT, 0, NEW).tokens
    remote, holders = split != "local", len(SPLITS[split]) - 1
    home = at(counts, "sync", "home", "distkv_dask")
    once = at(counts, "sync", "home", "distkv_dask/kernels/index.py", "distkv_dask/kernels/prepared_merges.py")
    assert home - once == STEPS * (1 + layers * remote) + 1, counts.table()  # and one when the window ends
    assert once <= 8, "stops where a batch begins"
    ours = ("distkv_dask/worker/home", "distkv_dask/worker/shard", "distkv_dask/kernels")
    launches = at(counts, "launch", "home", *ours)
    tails = 2 * (split == "tail at a holder")  # keys and values are sent there, and not appended here
    assert launches <= STEPS * layers * (2 + (1 + holders) * remote + tails), counts.table()
    assert at(counts, "d2h", "home", "") == STEPS * (1 + layers * remote), counts.table()
    assert at(counts, "sync", "holder", "distkv_dask/worker") == STEPS * layers * holders
    assert at(counts, "launch", "holder", "") <= STEPS * layers * holders * 2
