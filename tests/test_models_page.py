"""The page of model types is right: it lists all types, and some are built, loaded and run again."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest
import torch
import transformers
from _models_page import outcome
from _tiny import NOT_CAUSAL, types
from model_coverage import verdict

PAGE = Path(__file__).resolve().parent.parent / "docs" / "models.md"


@cache
def listed() -> dict[str, tuple[str, str]]:
    """Model -> attention and outcome on the page."""
    lines = re.findall(r"^\| ([^|]+) \| ([^|]*) \| ([^|]+) \|$", PAGE.read_text(), re.MULTILINE)
    return {kind: (attention, said) for kind, attention, said in lines if said.strip("-") and kind != "type"}


def test_every_type_of_the_version_that_the_page_names_is_on_it() -> None:
    if f"transformers {transformers.__version__};" not in PAGE.read_text():
        pytest.skip("the page is of another version of transformers")
    assert set(listed()) == set(types()) - NOT_CAUSAL


def test_no_type_differs_or_fails_after_it_opened() -> None:
    assert [kind for kind, (_, said) in listed().items() if said.startswith(("differs", "fails"))] == []


SAMPLE = [
    *("llama", "qwen2, windows", "gemma3_text", "gpt_oss", "llama4_text", "deepseek_v3", "phi3, longrope", "mistral3"),
    *("gemma4_text, layers share KV", "gemma4_unified", "llama, head size 12", "falcon", "bloom", "mamba"),
    *("qwen3_next", "deepseek_v32"),
]


@pytest.mark.parametrize("kind", SAMPLE)
def test_what_the_page_says_of_a_type_is_found_again(kind: str) -> None:
    torch.set_num_threads(1)
    found = {"verdict": "", "reason": "", "attention": ""} | verdict(kind)
    assert (found["attention"], outcome(found)) == listed()[kind]
