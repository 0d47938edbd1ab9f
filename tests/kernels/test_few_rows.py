"""Products of few rows equal float64's, rounded to bfloat16 once, for any number of rows and any size."""

from __future__ import annotations

import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from distkv_dask.kernels import few_rows, native_kernel

pytestmark = pytest.mark.skipif(native_kernel.missing() is not None, reason="no C++ core")
SETS = [few_rows.MODEL, *few_rows.sets()]


def product(weight: Tensor, bias: Tensor | None, name: str) -> few_rows.FewRows:
    return few_rows.FewRows(few_rows.packed(weight), (weight.shape[0], weight.shape[1]), bias, ((4096, name),))


def right(rows: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """The result in float64, and how far a sum in fp32 that is rounded to bfloat16 may be from it."""
    exact = rows.double() @ weight.double().T + (0 if bias is None else bias.double())
    terms = rows.double().abs() @ weight.double().abs().T
    return exact, exact.abs() / 256 + terms * rows.shape[-1] * 2.0**-24 + 1e-37


@pytest.mark.parametrize("name", SETS)
@given(data=st.data())
def test_products_of_any_size_equal_float64(name: str, data: st.DataObject) -> None:
    rows, inputs, outputs = (data.draw(st.integers(1, most)) for most in (70, 100, 100))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    weight, bias = torch.randn(outputs, inputs).bfloat16(), torch.randn(outputs).bfloat16()
    bias = data.draw(st.sampled_from([None, bias]))
    given_rows = torch.randn(rows, inputs).bfloat16()
    exact, tolerance = right(given_rows, weight, bias)
    assert ((product(weight, bias, name)(given_rows).double() - exact).abs() <= tolerance).all()


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize(
    ("rows", "inputs", "outputs"), [(129, 1056, 40), (33, 1100, 33), (160, 70, 33), (300, 1025, 20)]
)
def test_many_and_long_rows(name: str, rows: int, inputs: int, outputs: int) -> None:
    weight, bias, given_rows = torch.randn(outputs, inputs).bfloat16(), torch.randn(outputs), torch.randn(rows, inputs)
    exact, tolerance = right(given_rows.bfloat16(), weight, bias.bfloat16())
    served = product(weight, bias.bfloat16(), name)
    together = served(given_rows.bfloat16())
    assert ((together.double() - exact).abs() <= tolerance).all()
    for at in range(0, rows, 32):  # the same bits as a few at a time
        assert torch.equal(served(given_rows[at : at + 32].bfloat16()), together[at : at + 32])


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("rows", [1, 3, 16, 17, 33])
def test_a_row_has_the_same_bits_in_any_batch(name: str, rows: int) -> None:
    weight, given_rows = torch.randn(96, 160).bfloat16(), torch.randn(rows, 160).bfloat16()
    served = product(weight, None, name)
    together = served(given_rows)
    assert all(torch.equal(served(given_rows[at : at + 1]), together[at : at + 1]) for at in range(rows))


@pytest.mark.parametrize("name", SETS)
def test_rows_may_lie_apart_and_have_any_shape(name: str) -> None:
    weight, apart = torch.randn(40, 64).bfloat16(), torch.randn(2, 9, 128).bfloat16()
    served = product(weight, None, name)
    for view in (apart[:, :, :64], apart[:, ::2, 64:], apart.transpose(1, 2)[:, :64].transpose(1, 2), apart[..., ::2]):
        found = served(view)
        assert found.shape == (*view.shape[:-1], 40)
        assert torch.equal(found, served(view.clone(memory_format=torch.contiguous_format)))


@pytest.mark.parametrize("name", SETS)
def test_what_is_no_number_stays_none_and_infinity_stays(name: str) -> None:
    weight = torch.zeros(33, 32).bfloat16()
    weight[0, 0], weight[1, 0], weight[32, 0] = float("nan"), float("inf"), -float("inf")
    found = product(weight, None, name)(torch.ones(2, 32).bfloat16())
    assert found[:, 0].isnan().all()
    assert (found[:, 1] == float("inf")).all()
    assert (found[:, 32] == -float("inf")).all()
    assert (found[:, 2:32] == 0).all()


@pytest.mark.parametrize("name", SETS)
def test_threads_share_panels_and_callers_do_not_disturb_each_other(name: str) -> None:
    weight, given_rows = torch.randn(1000, 64).bfloat16(), torch.randn(20, 64).bfloat16()
    served = product(weight, None, name)
    alone, threads, found = served(given_rows), torch.get_num_threads(), []
    torch.set_num_threads(3)
    try:
        callers = [threading.Thread(target=lambda: found.append(served(given_rows))) for _ in range(4)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join(60)
    finally:
        torch.set_num_threads(threads)
    assert len(found) == 4
    assert all(torch.equal(one, alone) for one in found)


def test_an_instruction_set_that_is_not_there_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="got 'sse'"):
        product(torch.ones(32, 32).bfloat16(), None, "sse")
