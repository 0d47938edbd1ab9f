"""The emulated card refuses what a real one refuses, and computes what the host computes."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

MIXED = "same device"


def ones(*shape: int) -> Tensor:
    return torch.ones(*shape, device="cuda")


@pytest.mark.parametrize(
    "operation",
    [
        lambda: ones(3) + torch.ones(3),
        lambda: torch.ones(3).add_(ones(3)),
        lambda: torch.tensor(1.0).add_(ones(1)[0]),
        lambda: torch.cat([ones(2), torch.ones(2)]),
        lambda: torch.nn.functional.linear(ones(2, 3), torch.ones(4, 3)),
        lambda: torch.index_select(ones(3), 0, torch.tensor([1])),
        lambda: torch.add(ones(3), 1, out=torch.empty(3)),
        lambda: torch.ones(3)[torch.tensor([1], device="cuda")],
        lambda: torch.where(ones(3) > 0, torch.zeros(3), ones(3)),
    ],
)
@pytest.mark.parametrize("inference", [False, True])
def test_host_and_device_do_not_mix(operation: Callable[[], Tensor], inference: bool) -> None:
    with torch.inference_mode(inference), pytest.raises(RuntimeError, match=MIXED):
        operation()


def test_an_address_tells_tensors_apart_and_is_none_of_the_hosts() -> None:
    x, y = torch.zeros(4, device="cuda"), torch.zeros(4, device="cuda")
    assert x.data_ptr() == x.view(2, 2).data_ptr() == x[1:].data_ptr() - 4
    assert x.data_ptr() != y.data_ptr()
    assert x.data_ptr() != x.bytes.data_ptr()


@pytest.mark.parametrize("read", [lambda x: x.numpy(), np.asarray, np.from_dlpack, lambda x: x.pin_memory()])
def test_the_host_cannot_read_device_memory(read: Callable[[Tensor], object]) -> None:
    with pytest.raises((TypeError, RuntimeError, BufferError)):
        read(ones(3))


def test_single_numbers_of_the_host_are_arguments_of_kernels() -> None:
    assert (ones(2) * torch.tensor(3.0)).tolist() == [3, 3]


def test_a_tensor_says_where_it_is() -> None:
    made = [
        ones(2), torch.tensor([1, 2], device="cuda"), torch.arange(3, device="cuda:0"), torch.ones(2).cuda(),
        torch.ones(2).to("cuda"), ones(2).to(torch.bfloat16), torch.empty(0, device="cuda"), torch.zeros_like(ones(2)),
        ones(2).new_zeros(3), ones(4).view(2, 2).t(), torch.full((2,), 7, device=torch.device("cuda", 0)),
        torch.as_tensor([1.0], device="cuda"), torch.empty_strided((2, 2), (1, 2), device="cuda"),
    ]  # fmt: skip
    assert {one.device for one in made} == {torch.device("cuda", 0)}
    assert all(one.is_cuda for one in made)
    assert {one.device.type for one in (ones(2).cpu(), torch.zeros_like(ones(2), device="cpu"))} == {"cpu"}


@pytest.mark.parametrize("inference", [False, True])
def test_results_are_those_of_the_host(inference: bool) -> None:
    def compute(x: Tensor, y: Tensor) -> list[Tensor]:
        x = x.clone()
        x[1:, ::2] += 1
        x.index_copy_(0, y[:2], x[2:4] * 2)
        values, at = torch.sort(x @ x.mT, dim=-1)
        parts = torch.cat(list(x.split(2)), dim=1).unbind(1)
        attended = torch.nn.functional.scaled_dot_product_attention(x[None, None], x[None, None], x[None, None])
        rows = x[y] + x.index_select(0, y)
        rows.masked_fill_(rows > 3, 0)
        normed = torch.nn.functional.rms_norm(x, (6,))
        return [x, values, at, *parts, attended, rows, normed, x.to(torch.bfloat16).float(), x.argmax(-1), x.T[1:3]]

    x, y = torch.randn(4, 6, generator=torch.Generator().manual_seed(1)), torch.tensor([3, 0, 1])
    with torch.inference_mode(inference):
        for there, here in zip(compute(x.cuda(), y.cuda()), compute(x, y), strict=True):
            assert there.is_cuda
            torch.testing.assert_close(there.cpu(), here)


def test_views_share_memory_and_inference_mode_treats_them_as_the_host_does() -> None:
    x = ones(4)
    with torch.inference_mode():
        view, new = x[1:], x + 1
    view.zero_()
    assert x.tolist() == [1, 0, 0, 0]
    assert (view.is_inference(), new.is_inference()) == (False, True)
    with pytest.raises(RuntimeError, match=r"[Ii]nference"):
        new.add_(1)


def test_tensors_are_copied_and_pickled_with_their_device() -> None:
    parameter = torch.nn.Parameter(ones(2), requires_grad=False)
    for again in (copy.deepcopy(parameter), pickle.loads(pickle.dumps(parameter))):
        assert again.is_cuda
        assert again.tolist() == [1, 1]
    assert isinstance(copy.deepcopy(parameter), torch.nn.Parameter)


def test_modules_move_with_tied_weights_still_tied() -> None:
    one, two = torch.nn.Linear(3, 3, bias=False), torch.nn.Linear(3, 3, bias=False)
    two.weight = one.weight
    both = torch.nn.Sequential(one, two).to("cuda")
    assert one.weight is two.weight
    assert both(ones(1, 3)).is_cuda
    assert both.cpu()(torch.ones(1, 3)).device.type == "cpu"


def test_another_card_is_not_there() -> None:
    with pytest.raises(RuntimeError, match="invalid device ordinal"):
        torch.cuda.get_device_properties(1)
    assert (torch.cuda.device_count(), torch.cuda.get_device_name(), torch.cuda.get_device_capability()) == (
        1, "Emulated GPU", (9, 0),
    )  # fmt: skip
