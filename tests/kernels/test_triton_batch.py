"""A layer on a GPU is a few launches and nothing else: no wait, no copy, no allocation; a step adds one copy.

Launches are recorded instead of executed, and so is every other torch operation on the device.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from attention_cases import CASES, Case, build
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton", reason="triton is not installed: pip install distkv-dask[gpu]")

from triton_cases import CUT, INDEX, prepare, served_by_triton

from distkv_dask.kernels import PreparedLayers, PreparedMerge, PreparedMerges, prepared, triton_jit, triton_merge

VIEWS = tuple(f"aten::{name}" for name in ("slice", "view", "select", "detach", "alias", "as_strided", "unbind"))
READS = tuple(f"aten::{name}" for name in ("_local_scalar_dense", "item", "nonzero", "equal", "_to_copy", "unique"))


class Operations(TorchDispatchMode):
    """Names of operations that would be queued, or would wait."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if not name.startswith(VIEWS):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, Any, list[int]]]]:
    """Name, grid and addresses of each launch."""
    made: list[tuple[str, Any, list[int]]] = []

    class Recorder:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *args, **_: made.append(
                (self.name, grid, [x.data_ptr() for x in args if isinstance(x, torch.Tensor)])
            )

    for module, name in ((triton_jit, "attend"), (triton_jit, "append"), (triton_merge, "merge_partials")):
        monkeypatch.setattr(module, name, Recorder(name))
    with served_by_triton():
        yield made


def layers_of(case: Case) -> tuple[PreparedLayers, dict[str, Any], torch.Tensor]:
    arguments = build(case, torch.float16)
    attention = prepare(arguments, {name: arguments[name] for name in INDEX if name in arguments})
    slots = torch.zeros(2, len(case.lengths), dtype=torch.int64)
    layers = PreparedLayers([attention], [0], [arguments["k_pool"]], [arguments["v_pool"]], *slots)
    fresh = torch.zeros(2, len(case.lengths), case.kv_heads, case.d, dtype=torch.float16)
    return layers, arguments, fresh


@pytest.mark.parametrize("case", [*CUT, CASES[0], CASES[2]], ids=str)
def test_a_layer_is_at_most_four_launches_and_nothing_else(launches: list[Any], case: Case) -> None:
    layers, arguments, fresh = layers_of(case)
    with torch.inference_mode():
        layers(0, arguments["q"], *fresh, 0.1)
        first = list(launches)
        arguments["lengths"] -= (arguments["lengths"] > 0).int()
        layers.refresh()
        launches.clear()
        with Operations() as operations:
            layers(0, arguments["q"], *fresh, 0.1)
    assert operations.names == []
    assert launches == first, "a captured graph would compute on other memory, or with other grids"
    assert [name for name, *_ in launches][:2] == ["append", "attend"]
    assert len(launches) <= 4


def test_a_step_is_one_copy_of_what_the_host_knows(launches: list[Any]) -> None:
    layers, _, _ = layers_of(CUT[0])
    with torch.inference_mode(), Operations() as operations:
        layers.refresh()
    assert operations.names.count("aten::copy_") == 1
    assert not [name for name in operations.names if name.startswith(READS)]
    assert launches == []


def test_all_partials_of_a_step_merge_in_one_launch(launches: list[Any]) -> None:
    out, lse, partials = torch.zeros(3, 2, 16), torch.zeros(3, 2), torch.zeros(5 * 2 * 17)
    merges = PreparedMerges(out, lse, partials, [3, 2], [(0, 0, 0, 3), (1, 0, 0, 1), (1, 1, 2, 1)])
    with Operations() as operations:
        merges()
    assert operations.names == []
    assert [name for name, *_ in launches] == ["merge_partials"]


def test_a_merge_with_an_index_waits_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepared, "native_serves", lambda *_: False)
    out, lse, part_out, part_lse = torch.zeros(3, 2, 16), torch.zeros(3, 2), torch.ones(2, 2, 16), torch.ones(2, 2)
    merge = PreparedMerge(out, lse, part_out, part_lse, torch.tensor([2, 0]))
    with Operations() as operations:
        merge()
    assert not [name for name in operations.names if name.startswith(READS)]
    assert (out[0] > 0).all()
    assert not out[1].any()


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("lengths", 10_000, "lengths"),
        ("lengths", -1, "lengths"),
        ("block_tables", 99, "block_tables"),
        ("block_tables", -1, "block_tables"),
        ("blocks", 99, "layer, blocks, offsets"),
        ("offsets", 16, "layer, blocks, offsets"),
        ("offsets", -1, "layer, blocks, offsets"),
    ],
)
def test_values_out_of_range_are_named_on_the_host_before_anything_is_launched(
    launches: list[Any], name: str, value: int, text: str
) -> None:
    arguments = build(CASES[2], torch.float16)
    slots = {"blocks": torch.zeros(4, dtype=torch.int64), "offsets": torch.zeros(4, dtype=torch.int64)}
    (arguments | slots)[name].view(-1)[0] = value
    with pytest.raises(ValueError, match=f"^{text}"):
        PreparedLayers(
            [prepare(arguments, {name: arguments[name] for name in INDEX if name in arguments})], [0],
            [arguments["k_pool"]], [arguments["v_pool"]], *slots.values(),
        )  # fmt: skip
    assert launches == []
