"""Packed linears give the same results as before, and are made only if there is room for them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from distkv_dask.kernels import few_rows
from distkv_dask.worker.model.packed import PART, Choice, FewRowsLinear, PackedLinear, pack_linears, packing_room

needs_onednn = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available() or not torch.ops.mkldnn._is_mkldnn_bf16_supported(),
    reason="oneDNN does not serve bfloat16 on this processor",
)
needs_core = pytest.mark.skipif(few_rows.native_kernel.missing() is not None, reason="no C++ core")
MODEL = Choice(((16, few_rows.MODEL),), alone=8)


def onednn() -> Choice:
    return Choice(onednn=True)


def model(dtype: torch.dtype = torch.bfloat16) -> nn.Sequential:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Embedding(96, 64), nn.Linear(64, 48), nn.SiLU(), nn.Linear(48, 64, bias=False))
    made.append(nn.Linear(64, 96, bias=False))
    made[4].weight = made[0].weight  # tied
    return made.to(dtype).eval()


@needs_onednn
@pytest.mark.parametrize("rows", [0, 1, 3, 8, 100])
def test_linears_packed_by_onednn_give_the_same_bits_for_any_number_of_rows(rows: int) -> None:
    made, ids = model(), torch.arange(rows) % 96
    with torch.inference_mode():
        right = made(ids)
        size = pack_linears(made, 1 << 20, onednn)
        assert size == 2 * (64 * 48 + 48 * 64 + 96 * 64)
        assert torch.equal(made(ids), right)
        strided = torch.randn(4, 2 * 48).bfloat16()[:, ::2]
        assert torch.equal(made[3](strided), nn.functional.linear(strided, made[3].weight))


@needs_core
def test_more_rows_than_the_core_serves_are_computed_by_torch() -> None:
    made = model()
    pack_linears(made, 1 << 20, lambda: MODEL)
    assert all(isinstance(made[at].forward, FewRowsLinear) for at in (1, 3, 4))
    for rows in (0, 8, 9, 100):
        given = torch.randn(rows, 64).bfloat16()
        right = given.double() @ made[1].weight.double().T + made[1].bias.double()
        found = made[1](given)
        assert found.shape == (rows, 48)
        assert torch.allclose(found.double(), right, rtol=1 / 128, atol=1e-3)
        assert rows <= 8 or torch.equal(found, nn.functional.linear(given, made[1].weight, made[1].bias))


@pytest.mark.parametrize(
    "choice", [pytest.param(Choice(onednn=True), marks=needs_onednn), pytest.param(MODEL, marks=needs_core)]
)
def test_weights_and_names_stay_as_they_were(choice: Choice) -> None:
    made = model()
    before = {name: weight.clone() for name, weight in made.state_dict().items()}
    assert pack_linears(made, 1 << 20, lambda: choice) > 0
    assert made.state_dict().keys() == before.keys()
    assert all(torch.equal(weight, before[name]) for name, weight in made.state_dict().items())
    assert made[4].weight is made[0].weight


@needs_onednn
def test_a_linear_that_computes_in_another_way_goes_on_doing_so() -> None:
    made = model()
    made[1].forward = skips = made[1].forward
    pack_linears(made, 1 << 20, onednn)
    assert made[1].forward is skips
    assert isinstance(made[3].forward, PackedLinear)


def test_nothing_is_packed_without_room_in_float32_or_where_torch_is_fastest() -> None:
    cases = (model(), 100, MODEL), (model(torch.float32), 1 << 20, MODEL), (model(), 1 << 20, Choice())
    for made, room, choice in cases:
        assert pack_linears(made, room, lambda choice=choice: choice) == 0
        assert not any("forward" in vars(module) for module in made)


def test_there_is_room_for_a_part_of_the_limit_or_of_what_is_free() -> None:
    assert packing_room(1 << 20) == PART * (1 << 20)
    assert 0 < packing_room(None) < 1 << 50
