"""Prepared batches on the emulated card: Triton's kernels, in its interpreter, within the counts of a layer."""

from __future__ import annotations

import emulated
import pytest
import torch
from attention_cases import Case, build, named
from triton_cases import CUT, INDEX, check_layers, check_merges, check_prepared, prepare, served_by_triton

from distkv_dask.kernels import PreparedLayers, triton_batch

pytest.importorskip("triton", reason="triton is not installed: pip install distkv-dask[gpu]")

BATCHES = [CUT[1], CUT[3], named("shared-prefix-of-16-questions")]


@pytest.mark.parametrize("case", BATCHES[:2], ids=str)
def test_steps_of_a_prepared_batch_equal_float64(case: Case) -> None:
    check_prepared(case, torch.bfloat16, device="cuda")


def test_new_kv_is_stored_and_seen_in_every_layer() -> None:
    check_layers("cuda")


def test_partials_of_all_holders_merge_to_the_softmax_over_them() -> None:
    check_merges("cuda")


@pytest.mark.parametrize("case", BATCHES, ids=str)
def test_a_layer_is_launches_only_and_a_step_one_copy_more(case: Case) -> None:
    arguments = build(case, torch.bfloat16, device="cuda")
    index = {name: arguments[name].cpu() for name in INDEX if name in arguments}
    k_pool, v_pool, q = arguments["k_pool"], arguments["v_pool"], arguments["q"]
    with emulated.counting() as warm:
        triton_batch.warm_up(k_pool, v_pool, q.shape[1])
    with served_by_triton():
        slots = torch.zeros(2, len(case.lengths), dtype=torch.int64)
        layers = PreparedLayers([prepare(arguments, index)], [0, 0], [k_pool] * 2, [v_pool] * 2, *slots)
    fresh = torch.zeros(2, len(case.lengths), case.kv_heads, case.d, dtype=torch.bfloat16, device="cuda")
    k, v = fresh[0], fresh[1]
    with torch.inference_mode(), emulated.counting() as layer:
        layers(0, q, k, v, 0.1)
        layers(1, q, k, v, 0.1)
    assert layer.of("launch") <= 2 * 4
    assert [layer.of(kind) for kind in ("sync", "h2d", "d2h", "alloc")] == [0, 0, 0, 0]
    assert set(layer.variants) <= set(warm.variants), "compiled in the middle of a step"
    with torch.inference_mode(), emulated.counting() as step:
        layers.refresh()
    assert [step.of(kind) for kind in ("launch", "sync", "h2d", "d2h", "alloc")] == [0, 0, 1, 0, 0]
