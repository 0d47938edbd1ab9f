"""Prompts beyond a model's window, with scaled rotary embeddings: the tokens of transformers with the same scaling."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from distributed import Client, Scheduler, Worker

from distkv_dask import ConfigError, Engine, InvalidRequestError, SamplingParams
from distkv_dask.models.source import resolve_model
from tests._cluster import engine_test
from tests._models import FAMILIES, model_dir, prompt_ids, reference_generate, save_model

WINDOW, NEW = 128, 12
TINY: dict[str, Any] = {"dtype": "float32", "kv_memory": "768 KiB", "block_tokens": 8, "prefill_chunk_tokens": 32}


def short_model() -> Path:
    """A model trained for 128 tokens."""
    config = FAMILIES["llama-gqa"]()
    config.max_position_embeddings = WINDOW
    return save_model(config, "llama-gqa-128")


def scaled_copy(model: Path, scaling: dict[str, Any], folder: Path) -> Path:
    """The same weights with the scaling written into the configuration, as a user of transformers would do."""
    copy = shutil.copytree(model, folder / "scaled")
    config = json.loads((copy / "config.json").read_text())
    config["rope_parameters"] |= {"original_max_position_embeddings": WINDOW, **scaling}
    config["max_position_embeddings"] = 4 * WINDOW
    (copy / "config.json").write_text(json.dumps(config))
    return Path(copy)


@pytest.mark.parametrize("kind", ["yarn", "linear"])
def test_a_prompt_beyond_the_window_gets_the_tokens_of_transformers_with_the_same_scaling(
    kind: str, tmp_path: Path
) -> None:
    model, scaling, prompt = short_model(), {"rope_type": kind, "factor": 4.0}, prompt_ids(300, seed=6)
    expected = reference_generate(scaled_copy(model, scaling, tmp_path), [prompt], NEW)[0].tokens
    assert expected != reference_generate(model, [prompt], NEW)[0].tokens
    greedy = SamplingParams(max_new_tokens=NEW, ignore_eos=True)

    @engine_test()
    async def run(client: Client, scheduler: Scheduler, *workers: Worker) -> None:
        async with Engine(client, str(model), rope_scaling=scaling, **TINY) as engine:
            done = await engine.submit(prompt, greedy)
            assert len(done.placement) == 2
            assert list(done.token_ids) == expected
            with pytest.raises(InvalidRequestError, match="window of 512 tokens"):
                engine.submit(prompt_ids(501), greedy)
        async with Engine(client, str(model), **TINY) as engine:
            with pytest.raises(InvalidRequestError, match="window of 128 tokens"):
                engine.submit(prompt, greedy)

    run()


@pytest.mark.parametrize(
    ("scaling", "match"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, "keys that are stored become wrong"),
        ({"rope_type": "yarn"}, "factor of rope_scaling is None"),
        ({"rope_type": "yarn", "factor": 0.5}, "number above 1"),
        ("yarn", "should be like"),
    ],
)
def test_a_scaling_that_cannot_be_right_is_refused(scaling: Any, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        resolve_model(str(model_dir("llama-gqa")), scaling)


def test_a_model_that_scales_already_is_not_scaled_twice(tmp_path: Path) -> None:
    scaling = {"rope_type": "yarn", "factor": 4.0}
    scaled = scaled_copy(short_model(), scaling, tmp_path)
    with pytest.raises(ConfigError, match="scales its rotary embeddings already"):
        resolve_model(str(scaled), scaling).config()
