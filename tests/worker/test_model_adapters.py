"""Adapters of one model: with packed, tiled and plain linears, for their own rows only, within limits."""

from __future__ import annotations

import gc
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from distkv_dask.adapter import Adapter
from distkv_dask.errors import AdapterError, CapacityError, DistKVError
from distkv_dask.kernels import few_rows
from distkv_dask.models.adapter_files import read_adapter
from distkv_dask.worker.model import lora
from distkv_dask.worker.model.load import load_model
from distkv_dask.worker.model.loaded import LoadedModel
from distkv_dask.worker.model.lora import PlacedAdapter, adapted_rows, adapting
from distkv_dask.worker.model.packed import Choice
from tests._cluster import about_the_host
from tests._models import model_dir

pytest.importorskip("peft")
from tests._adapters import adapter_dir

pytestmark = about_the_host("models are loaded without an engine")
LLAMA = "llama-gqa"


class EachItself:
    """Replaces attention by a function of each token's own query, key and value."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, sinks: Any = None) -> Tensor:
        groups = q.shape[1] // v.shape[1]
        return v.repeat_interleave(groups, 1) + scale * q * k.repeat_interleave(groups, 1)


def loaded(dtype: str = "float32", room: int = 1 << 30, limit: int = 2, **options: Any) -> LoadedModel:
    model = load_model(str(model_dir(LLAMA)), dtype, 1, **options)
    model.adapters.room, model.adapters.limit = room, limit
    return model


def logits(model: LoadedModel, *counts: tuple[Adapter | None, int]) -> Tensor:
    """Logits of (adapter, number of tokens) pairs; each pair has the same first tokens."""
    rows = [(model.adapter(adapter), count) for adapter, count in counts]
    tokens = torch.cat([torch.arange(count) for _, count in counts])
    with adapting(adapted_rows(rows)):
        return model.forward(tokens + 7, tokens, EachItself())


def adapters(count: int) -> list[Adapter]:
    return [read_adapter(adapter_dir(LLAMA, seed)) for seed in range(count)]


def test_adjacent_rows_of_one_adapter_are_one_run_and_rows_without_one_are_in_none() -> None:
    one, two = PlacedAdapter({}, 0), PlacedAdapter({}, 0)
    rows = adapted_rows([(one, 2), (one, 3), (None, 4), (one, 1), (two, 0), (two, 2)])
    assert [(run.adapter is one, run.start, run.stop) for run in rows.runs] == [
        (True, 0, 5),
        (True, 9, 10),
        (False, 10, 12),
    ]
    assert rows.tokens == 12


@pytest.mark.parametrize("options", [{}, {"deterministic": True}, {"from_disk": True}])
def test_rows_have_what_their_own_adapter_adds_and_others_nothing(options: dict[str, Any]) -> None:
    model, (one, two) = loaded(**options), adapters(2)
    plain = logits(model, (None, 5))
    alone = logits(model, (one, 5)), logits(model, (two, 5))
    together = logits(model, (one, 5), (None, 5), (two, 5), (one, 5)).split(5)
    for found, right in zip(together, (alone[0], plain, alone[1], alone[0]), strict=True):
        torch.testing.assert_close(found, right, atol=1e-5, rtol=1e-5)
    assert (alone[0] - plain).abs().max() > 0.1
    assert (alone[0] - alone[1]).abs().max() > 0.1
    assert torch.equal(logits(model, (None, 5)), plain), "nothing is left of an adapter after its forward"


def test_with_deterministic_a_row_has_the_same_bits_in_any_company() -> None:
    model, (one, two) = loaded(deterministic=True), adapters(2)
    alone = logits(model, (one, 1))
    for counts in ([(one, 9)], [(one, 100), (two, 3)], [(one, 3), (None, 70), (two, 2)]):
        assert torch.equal(logits(model, *counts)[:1], alone)


@pytest.mark.parametrize(
    ("choice", "rounding"), [(Choice(onednn=True), 0.0), (Choice(((64, few_rows.MODEL),), alone=64), 0.02)]
)
def test_packed_linears_give_the_same_numbers_with_adapters(choice: Choice, rounding: float) -> None:
    model, (one,) = loaded("bfloat16"), adapters(1)
    plain, before = logits(model, (None, 3), (None, 2)), logits(model, (one, 3), (None, 2))
    if choice.few and few_rows.native_kernel.missing() is not None:
        pytest.skip("no C++ core")
    model.pack(1 << 30, 512, lambda: choice)
    if not model.is_packed:
        pytest.skip("oneDNN does not serve bfloat16 on this processor")
    for found, right in ((logits(model, (one, 3), (None, 2)), before), (logits(model, (None, 3), (None, 2)), plain)):
        torch.testing.assert_close(found, right, rtol=rounding, atol=rounding * float(right.abs().max()))
    assert (before - plain)[:3].abs().max() > 0.1 * before.abs().max()
    assert ("3 layers computed in C++" in model.where) == bool(choice.few)


def test_those_used_last_are_kept_as_far_as_there_is_room() -> None:
    made = adapters(3)
    model = loaded(limit=2)
    for adapter in (made[0], made[1], made[0], made[2]):
        model.adapter(adapter)
    assert model.adapters.paths == (made[0].path, made[2].path)
    size = model.adapters.nbytes // 2
    model.adapters.room = size
    model.adapter(made[1])
    assert (model.adapters.paths, model.adapters.nbytes) == ((made[1].path,), size)
    model.adapters.room = size - 1
    with pytest.raises(CapacityError, match=f"needs {size} bytes of memory, but weights and KV leave {size - 1}"):
        model.adapter(made[0])


def test_what_is_read_and_never_used_is_forgotten() -> None:
    model, made = loaded(limit=2), adapters(4)
    for adapter in made:
        model.prepare(None, adapter)
    assert [model.is_prepared(None, adapter) for adapter in made] == [False, False, True, True]
    assert model.adapters.paths == ()


def test_an_adapter_that_was_changed_since_the_client_saw_it_is_refused(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(adapter_dir(LLAMA, 0), tmp_path / "adapter"))
    seen = read_adapter(folder)
    shutil.rmtree(folder)
    shutil.copytree(adapter_dir(LLAMA, 1), folder)
    model = loaded()
    model.prepare(None, seen)
    with pytest.raises(AdapterError, match="not the one that the client saw"):
        model.adapter(seen)
    assert read_adapter(folder).fingerprint != seen.fingerprint
    assert model.adapter(read_adapter(folder)) is not None


def test_a_layer_that_sees_other_rows_than_the_tokens_is_no_wrong_answer() -> None:
    model, (one,) = loaded(), adapters(1)
    rows = adapted_rows([(model.adapter(one), 4)])
    with pytest.raises(DistKVError, match="for 3 rows in a step of 4 tokens"), adapting(rows):
        model.forward(torch.arange(3), torch.arange(3), EachItself())
    assert getattr(lora._here, "rows", None) is None


def test_adapters_do_not_keep_a_model() -> None:
    model, (one,) = loaded(), adapters(1)
    logits(model, (one, 3))
    gone = weakref.ref(model)
    gc.disable()
    try:
        del model
        assert gone() is None
    finally:
        gc.enable()
