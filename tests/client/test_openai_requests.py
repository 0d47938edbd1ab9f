"""OpenAI batch files: supported options work, options without effect are accepted, all others are refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_batch_row_errors import Engine, answers, landing
from test_tokenizer import byte_tokenizer

from distkv_dask.client.batch.job import Job
from distkv_dask.client.batch.openai_format import DEFAULTS, OpenAIBatchSource, default_sampling
from distkv_dask.client.batch.openai_request import content_of
from distkv_dask.client.batch.sources import source_for
from distkv_dask.client.batch.spec import BatchSpec
from distkv_dask.client.batch.target import target_of
from distkv_dask.client.tokenizer import Tokenizer
from distkv_dask.errors import InvalidRequestError
from distkv_dask.sampling import SamplingParams

__all__ = ["landing"]
USER = [{"role": "user", "content": "Hi"}]


def chat(custom_id: Any = "a", url: Any = "/v1/chat/completions", **body: Any) -> dict[str, Any]:
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": {"model": "m", "messages": USER, **body}}


def completion(prompt: Any, **body: Any) -> dict[str, Any]:
    return {"custom_id": "a", "url": "/v1/completions", "body": {"prompt": prompt, **body}}


HARMLESS: dict[str, Any] = {
    "tools": [], "functions": [], "tool_choice": "none", "function_call": "auto", "top_logprobs": 0, "logit_bias": {},
    "service_tier": "flex", "user": "u", "metadata": {"a": "b"}, "store": True, "stream": False, "stream_options": None,
    "n": 1, "logprobs": False, "response_format": {"type": "text"}, "frequency_penalty": 0.0, "presence_penalty": 0,
    "parallel_tool_calls": True, "modalities": ["text"], "prompt_cache_key": "k", "safety_identifier": "s",
    "min_tokens": 0, "skip_special_tokens": True,
}  # fmt: skip
REFUSED: dict[str, Any] = {
    "tools": [{"type": "function"}], "functions": [{}], "tool_choice": "required", "top_logprobs": 3,
    "logit_bias": {"5": 1}, "stream": True, "logprobs": 3, "response_format": {"type": "grammar"},
    "structured_outputs": {"regex": "a", "json": {}},
    "frequency_penalty": 0.5, "modalities": ["text", "audio"], "audio": {}, "reasoning_effort": "high",
    "web_search_options": {}, "echo": True, "guided_regex": "x", "n_": 1, "prompt": "x",
}  # fmt: skip


@pytest.mark.parametrize("name", HARMLESS)
def test_a_field_that_changes_nothing_is_no_error(name: str) -> None:
    assert content_of(chat(**{name: HARMLESS[name]})) == content_of(chat()) == content_of(chat(**{name: None}))


@pytest.mark.parametrize("name", REFUSED)
def test_a_field_that_would_change_something_is_refused_by_name(name: str) -> None:
    with pytest.raises(InvalidRequestError, match=name if name != "prompt" else "instead of a prompt"):
        content_of(chat(**{name: REFUSED[name]}))


def test_what_can_be_done_is_done() -> None:
    said = {
        "top_k": 5,
        "min_p": 0.1,
        "repetition_penalty": 1.2,
        "temperature": 0,
        "top_p": 0.5,
        "seed": 3,
        "stop": ["x"],
    }
    assert content_of(chat(**said, max_completion_tokens=9)).sampling == said | {"max_new_tokens": 9}
    assert content_of(chat(top_k=-1)).sampling == {"top_k": 0}
    assert content_of(chat(response_format={"type": "json_object"})).sampling == {"schema": {"type": "object"}}
    for structured, ours in (
        ({"json": {}}, "schema"),
        ({"regex": "a+"}, "regex"),
        ({"grammar": "start: A"}, "grammar"),
    ):
        assert content_of(chat(structured_outputs=structured)).sampling == {ours: next(iter(structured.values()))}
    assert content_of(chat(chat_template_kwargs={"enable_thinking": False})).template == {"enable_thinking": False}
    assert content_of(completion(["one text"])).prompt == "one text"
    assert content_of(completion([5, 6])).prompt == [5, 6]
    parts = [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]
    assert content_of(chat(messages=[{"role": "user", "content": parts}])).prompt == USER


@pytest.mark.parametrize(
    ("request_", "named"),
    [
        (chat(7), "custom_id is 7"),
        (chat(None), "custom_id is None"),
        ({"url": "/v1/chat/completions", "body": {}}, "custom_id is None"),
        (chat(url="/v1/responses"), "responses"),
        (chat(url=7), "url is 7"),
        (chat() | {"method": "GET"}, "method is 'GET'"),
        (chat() | {"body": "x"}, "body"),
        (chat(messages=[]), "messages"),
        (chat(messages="Hi"), "messages"),
        (chat(messages=[{"role": "user", "content": [{"type": "image_url"}]}]), "image_url"),
        (chat(max_tokens=1, max_completion_tokens=2), "differ"),
        (chat(chat_template_kwargs=[1]), "chat_template_kwargs"),
        (completion("x", top_logprobs=0), "top_logprobs"),
        (completion(["one", "two"]), "prompt"),
        (completion(None), "prompt"),
        (completion("x", messages=USER), "messages"),
        (completion("x", chat_template_kwargs={"a": 1}), "chat_template_kwargs"),
    ],
)
def test_what_is_no_request_that_can_be_answered_is_named(request_: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidRequestError, match=named):
        content_of(request_)


def test_variables_reach_the_chat_template_and_cannot_replace_it() -> None:
    template = "{% for m in messages %}{{ m.content }}{% endfor %}{% if deep %}think{% endif %}"
    loaded = byte_tokenizer(template)
    tokenizer = Tokenizer(loaded, len(loaded))
    assert tokenizer.with_variables({"deep": True}).encode(USER) == loaded("Hithink")["input_ids"]
    assert tokenizer.encode(USER) == loaded("Hi")["input_ids"]
    for name in ("chat_template", "tokenize", "messages", "add_generation_prompt", "bos_token", "a b"):
        with pytest.raises(InvalidRequestError, match=name):
            tokenizer.with_variables({name: "x"})


TABLE_LINE = {"text": "a row of a table"}


@pytest.mark.parametrize(
    ("lines", "is_batch"),
    [
        (["nonsense", chat("1"), chat("2")], True),
        (["", " ", chat("1")], True),
        ([TABLE_LINE, chat("1"), chat("2")], True),
        ([{"url": "/v1/chat/completions", "body": {}}, chat("1")], True),
        ([["a"], chat("1")], True),
        ([chat("1"), TABLE_LINE, TABLE_LINE], False),
        ([{"custom_id": "a", "url": "https://example.org", "body": "text", "text": "x"}], False),
        (["nonsense"], False),
        ([TABLE_LINE], False),
    ],
)
def test_what_a_file_is_does_not_hang_on_its_first_line(tmp_path: Path, lines: list[Any], is_batch: bool) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    if is_batch:
        assert isinstance(source_for(path, BatchSpec(sampling=DEFAULTS), None, None), OpenAIBatchSource)
    assert (default_sampling(path) == DEFAULTS) == is_batch


def run(folder: Path, lines: list[Any], sampling: SamplingParams = DEFAULTS) -> tuple[list[dict[str, Any]], Any]:
    """Answer a batch file; returns the lines of its output, and the engine."""
    path = folder / "in.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    engine = Engine()
    engine.tokenizer = Tokenizer(byte_tokenizer(), 320)  # type: ignore[assignment]
    seen: list[SamplingParams] = []
    submit = engine.submit
    engine.submit = lambda prompt, params: (seen.append(params), submit(prompt, params))[1]  # type: ignore[method-assign]
    target = target_of(folder / "out.jsonl", path, True)
    Job(engine, OpenAIBatchSource(path), BatchSpec(sampling=sampling), in_flight=1).write(target, False, False)  # type: ignore[arg-type]
    assert len(answers(target.folder)) == len(lines)
    return [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()], seen


def test_ids_that_are_no_text_or_come_twice_are_errors_that_name_them(tmp_path: Path) -> None:
    ids = ["a", 7, None, ["x"], "a", "b"]
    found, seen = run(tmp_path, [chat(one) for one in ids])
    assert [one["custom_id"] for one in found] == ["a", "7", None, '["x"]', "a", "b"]
    assert [one["error"] is None for one in found] == [True, False, False, False, False, True]
    assert "custom_id is 7" in found[1]["error"]["message"]
    assert "used by row 0" in found[4]["error"]["message"]
    assert len(seen) == 2


def test_what_the_batch_says_about_sampling_holds_where_requests_say_nothing(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    _, seen = run(
        tmp_path, [chat("a"), chat("b", temperature=0.5, max_tokens=3)], SamplingParams(max_new_tokens=9, top_k=4)
    )
    assert seen[0] == SamplingParams(max_new_tokens=9, top_k=4)
    assert seen[1] == SamplingParams(max_new_tokens=3, top_k=4, temperature=0.5)
    _, seen = run(tmp_path / "one", [chat("a")])
    assert seen[0].temperature == 1.0


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
SAID = "temperature", "max_tokens", "stop", "seed", "top_k", "chat_template_kwargs", "messages"
FIELDS = st.sampled_from([*HARMLESS, *REFUSED, *SAID])
REQUEST = st.fixed_dictionaries(
    {},
    optional={
        "custom_id": JSON,
        "url": st.sampled_from(["/v1/chat/completions", "/v1/completions"]) | JSON,
        "method": st.just("POST") | JSON,
        "body": st.dictionaries(FIELDS, JSON, max_size=4).map(lambda body: {"messages": USER} | body) | JSON,
    },
)


@settings(max_examples=60, deadline=None)
@given(st.lists(REQUEST | JSON, min_size=1, max_size=5))
def test_any_lines_have_an_answer_or_an_error_each(tmp_path_factory: pytest.TempPathFactory, lines: list[Any]) -> None:
    found, _ = run(tmp_path_factory.mktemp("any"), [chat("first"), *(json.dumps(line) for line in lines)])
    assert len(found) == 1 + len(lines)
    assert all((one["response"] is None) != (one["error"] is None) for one in found)


def test_several_answers_choices_and_log_probabilities_are_asked_for_by_their_names() -> None:
    asked = chat(n=2, best_of=3, logprobs=True, top_logprobs=4, prompt_logprobs=1)
    assert content_of(asked).sampling == {"n": 2, "best_of": 3, "logprobs": 4, "prompt_logprobs": 1}
    assert content_of(chat(logprobs=True)).sampling == {"logprobs": 0}
    assert content_of(completion("x", logprobs=2)).sampling == {"logprobs": 2}
    assert content_of(chat(structured_outputs={"choice": ["a", "b"]})).sampling == {"choices": ["a", "b"]}
