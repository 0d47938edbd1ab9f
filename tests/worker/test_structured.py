"""Whatever a model prefers to say, an answer with a schema is JSON of that schema, and other forms hold, too."""

from __future__ import annotations

import json
import re
from typing import Any

import jsonschema
import pytest
import torch

pytest.importorskip("llguidance", reason="llguidance is not installed (extra: schema)")

from distkv_dask import InvalidRequestError
from distkv_dask.models.source import resolve_model
from distkv_dask.sampling import Form
from distkv_dask.worker.model.structured import Grammars
from tests._models import VOCAB, text_model_dir

END = VOCAB - 1
SCHEMAS: dict[str, dict[str, Any]] = {
    "object": {
        "type": "object",
        "properties": {
            "who": {"type": "string", "maxLength": 6},
            "year": {"type": "integer", "minimum": 1900, "maximum": 2100},
            "kind": {"enum": ["profit", "loss"]},
            "sure": {"type": "boolean"},
        },
        "required": ["who", "year", "kind", "sure"],
        "additionalProperties": False,
    },
    "list": {"type": "array", "items": {"type": "integer", "maximum": 9, "minimum": -9}, "minItems": 2, "maxItems": 4},
    "text": {"type": "string", "pattern": "^[a-c]{3,5}$"},
}


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    return Grammars(resolve_model(str(text_model_dir(end=True))).tokenizer, frozenset([END]), VOCAB + 5)


def text_of(tokens: list[int]) -> str:
    text: str = resolve_model(str(text_model_dir(end=True))).tokenizer().decode(tokens)  # type: ignore[union-attr]
    return text


def answer(grammars: Grammars, form: Form, seed: int) -> str:
    """The answer of a model with random preferences."""
    generator = torch.Generator().manual_seed(seed)
    follower, tokens = grammars.follow(form), list[int]()
    for _ in range(200):
        logits = torch.randn(VOCAB + 5, generator=generator)  # models have more logits than tokens
        token = int(logits.masked_fill(follower.forbidden(len(logits)), -torch.inf).argmax())
        if token == END:
            break
        follower.take_token(token)
        tokens.append(token)
    else:
        pytest.fail("it does not end")
    return text_of(tokens)


@pytest.mark.parametrize("name", SCHEMAS)
@pytest.mark.parametrize("seed", range(5))
def test_any_preferences_give_json_of_the_schema_then_the_end(grammars: Grammars, name: str, seed: int) -> None:
    said = answer(grammars, Form("schema", json.dumps(SCHEMAS[name])), seed)
    jsonschema.validate(json.loads(said), SCHEMAS[name])


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    "pattern", [r"[A-C]{2,5}-[0-9]{4}", r"(yes|no)(, (perhaps|never)){0,2}\.", r"[^a-z]{3} [0-9a-f]{1,4}"]
)
def test_any_preferences_match_the_regex(grammars: Grammars, pattern: str, seed: int) -> None:
    assert re.fullmatch(pattern, answer(grammars, Form("regex", pattern), seed))


@pytest.mark.parametrize("seed", range(5))
def test_any_preferences_are_of_the_grammar(grammars: Grammars, seed: int) -> None:
    """Balanced brackets, which no regular expression describes."""
    said = answer(grammars, Form("grammar", 'start: pair\npair: "(" inner ")" | "x"\ninner: pair | "y" pair "z"'), seed)
    while (shorter := re.sub(r"\(x\)|\(yxz\)", "x", said)) != said:
        said = shorter
    assert said == "x"


def test_a_follower_made_anew_from_the_committed_tokens_allows_the_same(grammars: Grammars) -> None:
    schema, generator = Form("schema", json.dumps(SCHEMAS["object"])), torch.Generator().manual_seed(3)
    follower, tokens = grammars.follow(schema), list[int]()
    while True:
        wishes = torch.randn(VOCAB + 5, generator=generator)
        ours = follower.forbidden(len(wishes))
        assert torch.equal(ours, grammars.follow(schema, tokens).forbidden(len(wishes)))
        if (token := int(wishes.masked_fill(ours, -torch.inf).argmax())) == END:
            break
        follower.take_token(token)
        tokens.append(token)


@pytest.mark.parametrize(
    ("end", "has_tokenizer", "match"),
    [([END], False, "fast Hugging Face tokenizer"), ([], True, "end-of-sequence token")],
)
def test_a_model_that_cannot_follow_a_schema_says_what_it_lacks(
    end: list[int], has_tokenizer: bool, match: str
) -> None:
    tokenizer = resolve_model(str(text_model_dir(end=True))).tokenizer if has_tokenizer else lambda: None
    with pytest.raises(InvalidRequestError, match=match):
        Grammars(tokenizer, frozenset(end), VOCAB).follow(Form("schema", "{}"))
