"""Packed linears compute what they computed before, bit for bit, and only where there is room for them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from distkv_dask.worker.model.packed import PART, PackedLinear, pack_linears, packing_room

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available() or not torch.ops.mkldnn._is_mkldnn_bf16_supported(),
    reason="oneDNN does not serve bfloat16 on this processor",
)


def model(dtype: torch.dtype = torch.bfloat16) -> nn.Sequential:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Embedding(96, 64), nn.Linear(64, 48), nn.SiLU(), nn.Linear(48, 64, bias=False))
    made.append(nn.Linear(64, 96, bias=False))
    made[4].weight = made[0].weight  # tied
    return made.to(dtype).eval()


@pytest.mark.parametrize("rows", [0, 1, 3, 8, 100])
def test_packed_linears_give_the_same_bits_for_any_number_of_rows(rows: int) -> None:
    made, ids = model(), torch.arange(rows) % 96
    with torch.inference_mode():
        right = made(ids)
        size = pack_linears(made, 1 << 20)
        assert size == 2 * (64 * 48 + 48 * 64 + 96 * 64)
        assert torch.equal(made(ids), right)
        strided = torch.randn(4, 2 * 48).bfloat16()[:, ::2]
        assert torch.equal(made[3](strided), nn.functional.linear(strided, made[3].weight))


def test_weights_and_names_stay_as_they_were() -> None:
    made = model()
    before = {name: weight.clone() for name, weight in made.state_dict().items()}
    pack_linears(made, 1 << 20)
    assert sum(isinstance(module.forward, PackedLinear) for module in made) == 3
    assert made.state_dict().keys() == before.keys()
    assert all(torch.equal(weight, before[name]) for name, weight in made.state_dict().items())
    assert made[4].weight is made[0].weight


def test_a_linear_that_computes_in_another_way_goes_on_doing_so() -> None:
    made = model()
    made[1].forward = skips = made[1].forward
    pack_linears(made, 1 << 20)
    assert made[1].forward is skips
    assert isinstance(made[3].forward, PackedLinear)


def test_nothing_is_packed_without_room_or_in_float32() -> None:
    for made, room in ((model(), 100), (model(torch.float32), 1 << 20)):
        assert pack_linears(made, room) == 0
        assert not any(isinstance(module.forward, PackedLinear) for module in made)


def test_there_is_room_for_a_part_of_the_limit_or_of_what_is_free() -> None:
    assert packing_room(1 << 20) == PART * (1 << 20)
    assert 0 < packing_room(None) < 1 << 50
