"""A linear is served by what was fastest for its numbers of rows, and gives the right product."""

from __future__ import annotations

import torch

from distkv_dask.kernels import few_rows
from distkv_dask.worker.model.linear_choice import IN_LAYERS, ROWS, choice, chosen, fastest, timed
from distkv_dask.worker.model.packed import ONEDNN, TORCH, Choice

SETS = ["amx_bf16", "avx512"]


def times(*fastest_ones: str, others: float = 2.0) -> dict[int, dict[str, float]]:
    """Seconds of all candidates, of which one takes 1 s and all others take longer."""
    names = (TORCH, ONEDNN, *SETS)
    return {
        rows: {name: 1.0 if name == best else others for name in names}
        for rows, best in zip(ROWS, fastest_ones, strict=False)
    }


def test_the_cores_products_serve_up_to_where_a_library_is_faster() -> None:
    found = times("avx512", "amx_bf16", "amx_bf16", TORCH, "amx_bf16", "amx_bf16")
    assert choice(found, SETS) == Choice(((1, "avx512"), (16, "amx_bf16")), alone=16)


def test_they_serve_more_rows_in_layers_where_a_library_is_a_little_faster() -> None:
    found = times("avx512", "avx512", "amx_bf16", TORCH, "amx_bf16", ONEDNN, others=IN_LAYERS)
    found[64]["avx512"] = found[512]["avx512"] = 1.5
    assert choice(found, SETS) == Choice(((4, "avx512"), (512, "amx_bf16")), alone=16)
    found[64]["amx_bf16"] = 1.3
    assert choice(found, SETS) == Choice(((4, "avx512"), (16, "amx_bf16")), alone=16)


def test_a_library_that_is_faster_with_one_row_serves_all() -> None:
    others = [*SETS, TORCH, TORCH, TORCH]
    assert choice(times(ONEDNN, *others, others=1.1), SETS) == Choice(onednn=True)
    assert choice(times(TORCH, *others, others=1.1), SETS) == Choice()
    assert choice({1: {TORCH: 1.0}}, []) == Choice()
    assert choice({}, SETS) == Choice()


def test_the_shortest_time_wins() -> None:
    assert fastest({TORCH: 2.0, ONEDNN: 1.0, "avx512": 3.0}) == ONEDNN


def test_every_candidate_is_timed_and_the_choice_can_be_used() -> None:
    names = {TORCH, *few_rows.sets()}
    assert all(names <= times.keys() and min(times.values()) > 0 for times in timed().values())
    found = chosen()
    assert found is chosen()
    assert {name for _, name in found.few} <= set(few_rows.sets())
    weight = torch.randn(64, 64).bfloat16()
    if found.few:
        product = few_rows.FewRows(few_rows.packed(weight), (64, 64), None, found.few)
        rows = torch.randn(1, 64).bfloat16()
        assert torch.allclose(product(rows).double(), rows.double() @ weight.double().T, rtol=1 / 128, atol=1e-2)
