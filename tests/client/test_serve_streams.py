"""Several prompts, several answers and log probabilities are the same in streams as in whole answers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from _served import Served, open_session, served, until

from distkv_dask.completion import Completion
from distkv_dask.sampling import SamplingParams

USER = [{"role": "user", "content": "Which river?"}]
DRAWN: dict[str, Any] = {"temperature": 0.9, "seed": 5}
PROMPTS = ["Once upon a time", "Twice", "The river"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with open_session() as session, served(session, tmp_path_factory.mktemp("data")) as found:
        yield found


def plain(server: Served, prompt: object, **sampling: Any) -> Completion:
    """The engine's answers without a server."""
    return server.serving.session.submit(prompt, SamplingParams(max_new_tokens=24, **DRAWN, **sampling)).result(60)


@pytest.mark.parametrize("stop", [None, "e"], ids=["whole", "stopped"])
def test_several_answers_of_a_chat_are_streamed_with_their_log_probabilities(server: Served, stop: str | None) -> None:
    more = {} if stop is None else {"stop": [stop]}
    done = plain(server, USER, n=3, logprobs=2, **more)
    chunks = list(
        server.openai().chat.completions.create(
            model="tiny", messages=USER, n=3, logprobs=True, top_logprobs=2, max_tokens=24, stream=True, **DRAWN, **more
        )
    )
    for at, answer in enumerate(done.answers):
        said = [one for chunk in chunks for one in chunk.choices if one.index == at]
        assert said[0].delta.role == "assistant"
        assert "".join(one.delta.content or "" for one in said) == answer.text
        assert [one.finish_reason for one in said if one.finish_reason] == [answer.finish_reason]
        tokens = [token for one in said if one.logprobs for token in one.logprobs.content]
        assert [one.logprob for one in tokens] == pytest.approx(
            [one.logprob for one in answer.logprobs or ()], abs=1e-4
        )
        assert {len(one.top_logprobs) for one in tokens} <= {2}


def test_completions_of_several_prompts_are_choices_in_their_order(server: Served) -> None:
    ask = server.openai().completions.create
    done = [plain(server, prompt, n=2, logprobs=1) for prompt in PROMPTS]
    answers = [answer for one in done for answer in one.answers]
    asked: dict[str, Any] = {"model": "tiny", "prompt": PROMPTS, "n": 2, "logprobs": 1, "max_tokens": 24, **DRAWN}
    whole = ask(**asked)
    assert [(one.index, one.text) for one in whole.choices] == [(at, one.text) for at, one in enumerate(answers)]
    prompt, new = sum(one.prompt_tokens for one in done), sum(len(one.token_ids) for one in answers)
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (prompt, new)

    *chunks, last = ask(**asked, stream=True, stream_options={"include_usage": True})
    assert (last.choices, last.usage.prompt_tokens, last.usage.completion_tokens) == ([], prompt, new)
    for at, answer in enumerate(answers):
        said = [one for chunk in chunks for one in chunk.choices if one.index == at]
        assert "".join(one.text for one in said) == answer.text
        found = [one.logprobs for one in said if one.logprobs]
        said_logprobs = [each for one in found for each in one.token_logprobs]
        assert said_logprobs == pytest.approx([one.logprob for one in answer.logprobs or ()], abs=1e-4)
        assert [each for one in found for each in one.text_offset] == whole.choices[at].logprobs.text_offset


def test_prompts_of_token_ids_are_several_too(server: Served) -> None:
    prompts = [[5, 6, 7, 8], [9, 10]]
    whole = server.openai().completions.create(model="tiny", prompt=prompts, max_tokens=24, **DRAWN)
    assert [one.text for one in whole.choices] == [plain(server, one).text for one in prompts]


def test_every_chunk_of_a_stream_that_counts_has_usage_and_only_the_last_one_has_figures(server: Served) -> None:
    for counts in (True, False):
        body = {"model": "tiny", "messages": USER, "stream": True, "stream_options": {"include_usage": counts}}
        with server.http() as http:
            lines = http.post("/v1/chat/completions", json=body).text.split("\n\n")
        *events, last = [json.loads(one.removeprefix("data: ")) for one in lines if one.startswith("data: {")]
        if counts:
            assert {json.dumps(one["usage"]) for one in events} == {"null"}
            assert last["usage"]["total_tokens"] == last["usage"]["prompt_tokens"] + 16
        else:
            assert not any("usage" in one for one in (*events, last))


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
@pytest.mark.parametrize(
    ("prompts", "named"),
    [
        (["good", ""], "empty"),
        (["good", [5] * 5000], "window"),
        (["x"] * 4, "4 prompts"),
        ([["a"]], "token"),
        ([], "empty"),
    ],
    ids=["empty", "long", "many", "nested", "none"],
)
def test_a_request_of_which_one_prompt_is_refused_is_refused(
    server: Served, prompts: list[Any], named: str, stream: bool
) -> None:
    before = server.count("distkv_http_tokens_total")
    with pytest.raises(openai.BadRequestError, match=named):
        server.openai().completions.create(model="tiny", prompt=prompts, max_tokens=9, stream=stream)
    server.idle()
    assert server.count("distkv_http_tokens_total") == before


def test_a_client_that_leaves_cancels_all_answers(server: Served) -> None:
    before = server.count("distkv_http_cancelled_total")
    stream = server.openai().completions.create(
        model="tiny", prompt=PROMPTS[:2], max_tokens=3000, n=2, stream=True, extra_body={"ignore_eos": True}, **DRAWN
    )
    next(iter(stream))
    stream.close()
    server.idle()
    until(lambda: server.count("distkv_http_cancelled_total") == before + 2)
