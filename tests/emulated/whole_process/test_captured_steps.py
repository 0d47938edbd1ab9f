"""Decode steps as CUDA graphs: the same tokens with few launches, and launches from Python if no graph is possible."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import emulated
import pytest
import torch
from _fakes import Fleet, fleet, reference, state
from _models import model_dir, prompt_ids
from _thorough import some_of

from distkv_dask.kernels import dispatch, triton_kernel
from distkv_dask.worker.device import Use
from distkv_dask.worker.device_choice import choose_device
from distkv_dask.worker.model.captured import why_not_captured
from distkv_dask.worker.model.load import load_model
from distkv_dask.worker.model.loaded import LoadedModel

PROMPT, NEW = 20, 10
SPLITS = {
    "local": (("w0", 48),),
    "one holder": (("w1", 16), ("w0", 32)),
    "two holders": (("w1", 8), ("w2", 8), ("w0", 32)),
    "tail at a holder": (("w0", 16), ("w1", 32)),
}


@cache
def loaded(family: str) -> LoadedModel:
    return load_model(str(model_dir(family)), "float32", 1, device=choose_device("cuda"))


@pytest.fixture
def triton(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(triton_kernel, "unsupported", lambda *case: None)
    dispatch.choose.cache_clear()
    yield
    dispatch.choose.cache_clear()


def decoded(made: Fleet, split: str, new: int = NEW) -> tuple[list[int], emulated.Counts]:
    """The tokens of one window, and the counts of its operations on the card."""
    placement = made.place(1, *SPLITS[split])
    first = made.prefill(1, placement, prompt_ids(PROMPT), PROMPT, "w0")
    with emulated.counting() as counts:
        result, _ = made.decode("w0", [state(1, placement, PROMPT, first, new)], None)
    made.release_sequence(1)
    return [first, *result.tokens[1]], counts


@pytest.mark.parametrize("split", some_of(SPLITS, "one holder"))
@pytest.mark.usefixtures("triton")
def test_replayed_steps_give_the_same_tokens(split: str) -> None:
    model = loaded("qwen3")
    with fleet(model, 3) as made:
        tokens, counts = decoded(made, split)
    assert tokens == reference("qwen3", PROMPT, 0, NEW + 1).tokens
    pieces = 1 if split == "local" else model.geometry.layers + 1
    assert counts.of("replay") == (NEW - 1) * pieces, "the first step is launched by Python"


@pytest.mark.parametrize("family", some_of(["gemma2", "mixtral", "deepseek-v3"], "gemma2"))
def test_attention_that_reads_the_host_runs_between_graphs(family: str) -> None:
    model = loaded(family)
    with fleet(model, 2) as made:
        tokens, counts = decoded(made, "local")
    assert tokens == reference(family, PROMPT, 0, NEW + 1).tokens
    assert counts.of("replay") == (NEW - 1) * (model.geometry.layers + 1)


@pytest.mark.usefixtures("triton")
def test_python_launches_the_model_twice_in_a_window_of_any_length() -> None:
    launches = []
    with fleet(loaded("qwen3"), 1) as made:
        for new in (8, 16):
            _, counts = decoded(made, "local", new)
            rows = counts.number.items()
            ours = "distkv_dask/worker/model/loaded.py", "distkv_dask/worker/home/attention.py", "distkv_dask/kernels"
            launches.append(sum(n for one, n in rows if one.kind == "launch" and one.place.startswith(ours)))
            assert counts.of("sync") <= new + 8, counts.table()  # the tokens of each step, and the beginning of a batch
    assert launches[0] == launches[1] > 0


def test_short_windows_are_not_captured() -> None:
    with fleet(loaded("qwen3"), 1) as made:
        _, counts = decoded(made, "local", 5)
    assert counts.of("replay") == 0


def test_a_forward_that_waits_for_the_card_is_not_captured() -> None:
    model = loaded("qwen3")
    with model.device.stream(Use.HOME):
        one = torch.ones(3, device="cuda")
        assert why_not_captured(model.device, lambda attention: one * 2, model.geometry) == ""
        why = why_not_captured(model.device, lambda attention: one * one.sum().item(), model.geometry)
        assert "not permitted when stream is capturing" in why
        assert why_not_captured(model.device, lambda attention: one * 3, model.geometry) == ""


def test_recurrent_layers_are_not_captured() -> None:
    model = loaded("qwen3-next")
    assert "recurrent" in model.uncaptured
    with fleet(model, 2) as made:
        tokens, counts = decoded(made, "one holder")
    assert tokens == reference("qwen3-next", PROMPT, 0, NEW + 1).tokens
    assert counts.of("replay") == 0
