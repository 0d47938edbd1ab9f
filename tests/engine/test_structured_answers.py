"""Requests with a JSON schema: the tokens of a plain loop over transformers with the same schema, in any windows."""

from __future__ import annotations

import gc
import json
import logging
import re
import weakref
from typing import Any

import jsonschema
import pytest
import torch
import transformers
from distributed import Client, Scheduler, Worker

pytest.importorskip("llguidance", reason="llguidance is not installed (extra: schema)")

from llguidance import LLMatcher
from llguidance.hf import from_tokenizer

from distkv_dask import Engine, InvalidRequestError, SamplingParams
from tests._cluster import engine_test
from tests._models import VOCAB, prompt_ids, reference_generate, text_model_dir

END = VOCAB - 1
YEAR = {"type": "integer", "minimum": 1900, "maximum": 2100}
YEARS = {"type": "array", "items": YEAR, "minItems": 2, "maxItems": 3}
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"who": {"type": "string", "maxLength": 12}, "years": YEARS},
    "required": ["who", "years"],
    "additionalProperties": False,
}
PATTERN = "[A-C]{2,5}-[0-9]{4}(, [a-c]{3})?"
LARK = f"start: code\ncode: /{PATTERN}/"
TINY: dict[str, Any] = {"dtype": "float32", "kv_memory": "512 KiB", "block_tokens": 8, "prefill_chunk_tokens": 32}


def reference(prompt: list[int], grammar: str) -> list[int]:
    """Greedy tokens of one process, with llguidance's mask applied to the logits of a whole forward each."""
    folder = text_model_dir(end=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = from_tokenizer(transformers.AutoTokenizer.from_pretrained(folder), n_vocab=VOCAB, eos_token=END)
    matcher = LLMatcher(tokenizer, grammar)
    tokens = list[int]()
    while True:
        with torch.no_grad():
            logits = model(torch.tensor([prompt + tokens])).logits[0, -1]
        bits = matcher.compute_bitmask()
        allowed = [token for token in range(VOCAB) if bits[token // 8] >> token % 8 & 1]
        token = max(allowed, key=lambda one: float(logits[one]))
        if token == END:
            return tokens
        matcher.consume_token(token)
        tokens.append(token)


@pytest.mark.parametrize("steps", [1, 3, 400])
def test_answers_are_those_of_one_process_and_follow_the_schema(steps: int) -> None:
    prompts = [prompt_ids(150, seed=4), prompt_ids(20, seed=5)]  # the first is on two workers
    options: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
    json_grammar = LLMatcher.grammar_from_json_schema(SCHEMA, defaults=options)
    expected = [reference(prompt, json_grammar) for prompt in prompts]
    expected_to_match = reference(prompts[1], f"start: /{PATTERN}/")

    @engine_test()
    async def run(client: Client, scheduler: Scheduler, *workers: Worker) -> None:
        async with Engine(client, str(text_model_dir(end=True)), window_steps=steps, **TINY) as engine:
            params = [SamplingParams(max_new_tokens=120, schema=SCHEMA), SamplingParams(120, schema=json.dumps(SCHEMA))]
            done = await engine.generate(prompts, params)
            assert len(done[0].placement) > 1
            assert [list(one.token_ids) for one in done] == expected
            assert {one.finish_reason for one in done} == {"stop"}
            for one in done:
                jsonschema.validate(json.loads(one.text), SCHEMA)
            done = await engine.generate(
                [prompts[1]] * 2, [SamplingParams(regex=PATTERN), SamplingParams(grammar=LARK)]
            )
            assert [list(one.token_ids) for one in done] == [expected_to_match] * 2
            assert re.fullmatch(PATTERN, done[0].text)
            with pytest.raises(InvalidRequestError, match="no text matches"):
                engine.submit(prompts[0], SamplingParams(regex=r"[^\s\S]"))
            with pytest.raises(InvalidRequestError, match="Unknown format"):
                engine.submit(prompts[0], SamplingParams(schema={"type": "string", "format": "nonsense"}))

    run()


MANY = {"type": "object", "properties": {f"secret{at}": {"type": "string"} for at in range(5000)}}
CHOICES = {"anyOf": [{"type": "object", "properties": {f"secret{at}": YEAR}} for at in range(300)]}


class Log(logging.Handler):
    """Everything that is logged, as one text."""

    def __init__(self) -> None:
        super().__init__()
        self.text = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.text += self.format(record)


@pytest.mark.parametrize("granularity", ["window", "layer"])
def test_a_schema_that_takes_too_long_and_an_odd_temperature_harm_no_neighbour(granularity: str) -> None:
    prompt, tiny = prompt_ids(20, seed=5), SamplingParams(max_new_tokens=8, temperature=1e-40, ignore_eos=True)
    plain = SamplingParams(max_new_tokens=8, ignore_eos=True)
    (expected,) = reference_generate(text_model_dir(end=True), [prompt], 8)
    log = Log()

    @engine_test()
    async def run(client: Client, scheduler: Scheduler, *workers: Worker) -> None:
        async with Engine(client, str(text_model_dir(end=True)), granularity=granularity, **TINY) as engine:
            bad = [SamplingParams(8, schema=MANY), SamplingParams(8, schema=CHOICES)]
            params = [plain, bad[0], tiny, bad[1], plain]
            done = await engine.generate([prompt] * 5, params)
            for at in (0, 2, 4):
                assert list(done[at].token_ids) == expected.tokens, done[at]
            for at in (1, 3):
                assert done[at].finish_reason == "error"
                assert "schema" in (done[at].error or "")
                assert "secret" not in (done[at].error or "")
            model = weakref.ref(workers[0].plugins["distkv"].engines[engine.id].model)
        gc.collect()
        assert model() is None, "an error keeps the calls that it comes from"

    logger = logging.getLogger("distributed")
    logger.addHandler(log)
    try:
        run()
    finally:
        logger.removeHandler(log)
    assert "secret" not in log.text
    assert str(prompt[3:6])[1:-1] not in log.text, "a prompt's tokens"
