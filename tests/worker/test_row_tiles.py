"""``distkv.deterministic``: a row's bits do not depend on the rows that are computed with it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from _models import model_dir
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from distkv_dask.errors import UnsupportedModelError
from distkv_dask.worker.model.load import load_model
from distkv_dask.worker.model.row_tiles import SIZES, check_rows_alike, compute_rows_alike, in_tiles, row_sizes


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@given(st.integers(0, 700), st.sets(st.sampled_from(SIZES), min_size=1))
def test_every_row_is_computed_once_in_numbers_of_rows_that_are_allowed(count: int, sizes: set[int]) -> None:
    rows, seen = torch.arange(2.0 * count).view(count, 2), []

    def double(some: Tensor) -> Tensor:
        seen.append(len(some))
        return 2 * some

    assert torch.equal(in_tiles(double, rows, sorted(sizes)), 2 * rows)
    assert set(seen) <= sizes or (count == 0 and seen == [0])
    assert sum(seen) < count + max(sizes)


@pytest.mark.parametrize(
    ("differs", "expected"),
    [
        (lambda rows: len(rows) in (1, 2, 16), (4, 8, 32, 64, 128, 256, 512)),
        (lambda rows: len(rows) > 100, (1, 2, 4, 8, 16, 32, 64)),
        (lambda rows: torch.arange(len(rows)) >= 8, (1, 2, 4, 8)),
        (lambda rows: torch.arange(len(rows)) > 0, (1,)),
    ],
    ids=["few", "many", "later places", "all places but the first"],
)
def test_sizes_are_those_with_which_a_row_is_the_same_in_every_place(differs, expected) -> None:  # type: ignore[no-untyped-def]
    def odd(rows: Tensor) -> Tensor:
        return rows + torch.as_tensor(differs(rows)).float().expand(len(rows))[:, None] * rows.sign() * 1e-3

    assert row_sizes(odd, torch.randn(512, 3), 3) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("inputs", "wide"), [(576, 1536), (97, 101), (64, 1000)])
def test_rows_of_linears_and_activations_have_the_same_bits_in_any_company(
    threads: int, dtype: torch.dtype, inputs: int, wide: int
) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(inputs, wide), torch.nn.SiLU(), torch.nn.Linear(wide, inputs, bias=False)
    )
    compute_rows_alike(model.to(dtype))
    rows = torch.randn(1, 700, inputs).to(dtype)
    with torch.inference_mode():
        together = model(rows)
        for start, stop in (
            (0, 1),
            (1, 3),
            (3, 6),
            (6, 11),
            (11, 20),
            (9, 72),
            (100, 164),
            (35, 100),
            (1, 514),
            (0, 0),
        ):
            assert torch.equal(model(rows[:, start:stop]), together[:, start:stop])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_experts_are_refused_for_their_rows_depend_on_others(dtype: str) -> None:
    with pytest.raises(
        UnsupportedModelError, match=r"distkv.deterministic: the model's .* set distkv.deterministic to"
    ):
        load_model(str(model_dir("mixtral")), dtype, 1, deterministic=True)


def test_a_model_whose_rows_depend_on_their_number_elsewhere_is_refused() -> None:
    model = load_model(str(model_dir("llama-gqa")), "float32", 1, deterministic=True)
    check_rows_alike(model.forward, model.geometry, model.device.torch)
    with pytest.raises(UnsupportedModelError, match="in addition to its linears"):
        check_rows_alike(
            lambda ids, *rest: model.forward(ids, *rest) + len(ids) % 2 * 1e-5, model.geometry, model.device.torch
        )
