"""The server through OpenAI's own client gives the answers of the engine without a server."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from _served import Limits, Served, open_session, served, until

from distkv_dask.client.serve.asked import check_written
from distkv_dask.client.serve.chat import ChatForm
from distkv_dask.client.serve.completions import TextForm
from distkv_dask.client.tokenizer import Tokenizer
from distkv_dask.completion import Completion
from distkv_dask.errors import InvalidRequestError
from distkv_dask.sampling import SamplingParams

USER = [{"role": "user", "content": "Which river?"}]
LONG = {"ignore_eos": True}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with open_session() as session, served(session, tmp_path_factory.mktemp("data")) as found:
        yield found


def plain(server: Served, prompt: object, tokens: int = 16, **sampling: object) -> tuple[str, int]:
    """The engine's answers without a server."""
    done = server.serving.session.submit(prompt, SamplingParams(max_new_tokens=tokens, **sampling)).result(60)
    return done.text, done.prompt_tokens


def test_a_chat_is_answered_as_the_engine_answers_it(server: Served) -> None:
    done = server.openai().chat.completions.create(model="tiny", messages=USER)
    text, tokens = plain(server, USER)
    assert done.choices[0].message.content == text
    assert (done.choices[0].message.role, done.choices[0].finish_reason) == ("assistant", "length")
    assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (tokens, 16)
    assert done.model == "tiny"


def test_a_streamed_chat_is_the_same_text_in_pieces_and_ends_with_its_tokens(server: Served) -> None:
    chunks = list(
        server.openai().chat.completions.create(
            model="tiny", messages=USER, max_completion_tokens=40, stream=True, stream_options={"include_usage": True}
        )
    )
    text, tokens = plain(server, USER, 40)
    said = [chunk.choices[0] for chunk in chunks if chunk.choices]
    assert "".join(one.delta.content or "" for one in said) == text
    assert said[0].delta.role == "assistant"
    assert [one.finish_reason for one in said] == [None] * (len(said) - 1) + ["length"]
    assert (chunks[-1].usage.prompt_tokens, chunks[-1].usage.completion_tokens) == (tokens, 40)
    assert len({chunk.id for chunk in chunks}) == 1


@pytest.mark.parametrize("prompt", ["Once upon", [5, 6, 7, 8]], ids=["text", "tokens"])
def test_completions_continue_texts_and_tokens_whole_and_in_pieces(server: Served, prompt: object) -> None:
    text, tokens = plain(server, prompt)
    ask = server.openai().completions.create
    done = ask(model="tiny", prompt=prompt)
    assert (done.choices[0].text, done.usage.prompt_tokens) == (text, tokens)
    assert "".join(chunk.choices[0].text for chunk in ask(model="tiny", prompt=prompt, stream=True)) == text


def test_what_a_request_says_about_sampling_is_what_is_done(server: Served) -> None:
    said = {"top_k": 7, "min_p": 0.05, "repetition_penalty": 1.2}
    done = server.openai().chat.completions.create(
        model="tiny", messages=USER, temperature=0.9, top_p=0.8, seed=5, max_tokens=24, extra_body=said
    )
    text, _ = plain(server, USER, 24, temperature=0.9, top_p=0.8, seed=5, **said)
    assert done.choices[0].message.content == text
    stop = text[5:7]
    cut = server.openai().chat.completions.create(
        model="tiny", messages=USER, temperature=0.9, top_p=0.8, seed=5, max_tokens=24, stop=stop, extra_body=said
    )
    assert cut.choices[0].message.content == text[: text.index(stop)]
    assert cut.choices[0].finish_reason == "stop"


def test_an_answer_follows_the_schema_of_its_request(server: Served) -> None:
    pytest.importorskip("llguidance", reason="llguidance is not installed (extra: schema)")
    schema = {
        "type": "object",
        "properties": {"yes": {"type": "boolean"}},
        "required": ["yes"],
        "additionalProperties": False,
    }
    done = server.openai().chat.completions.create(
        model="tiny", messages=USER,
        response_format={"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}},
    )  # fmt: skip
    assert done.choices[0].message.content in ('{"yes": true}', '{"yes": false}')


def test_models_are_listed_and_another_one_is_not_found(server: Served) -> None:
    client = server.openai()
    assert [one.id for one in client.models.list()] == ["tiny", server.serving.session.model.name]
    assert client.models.retrieve("tiny").id == "tiny"
    for ask in (
        lambda: client.models.retrieve("gpt-5"),
        lambda: client.chat.completions.create(model="gpt-5", messages=USER),
    ):
        with pytest.raises(openai.NotFoundError, match="gpt-5") as caught:
            ask()
        assert caught.value.code == "model_not_found"


def test_a_prompt_near_the_windows_end_gets_what_is_left_of_it(server: Served) -> None:
    window = server.serving.session.facts.max_positions
    done = server.openai().completions.create(model="tiny", prompt=[5] * (window - 3))
    assert (done.usage.completion_tokens, done.choices[0].finish_reason) == (3, "length")
    with pytest.raises(openai.BadRequestError, match="window"):
        server.openai().completions.create(model="tiny", prompt=[5] * window)


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_a_client_that_leaves_in_the_middle_cancels_its_request(server: Served, stream: bool) -> None:
    before = server.count("distkv_http_cancelled_total")
    with server.http() as http:
        body = {"model": "tiny", "messages": USER, "max_tokens": 3900, "stream": stream, "ignore_eos": True}
        if stream:
            with http.stream("POST", "/v1/chat/completions", json=body) as response:
                texts = response.iter_lines()
                assert [next(texts) for _ in range(6)]
        else:
            with pytest.raises(httpx.ReadTimeout):
                http.post("/v1/chat/completions", json=body, timeout=0.5)
    server.idle()
    until(lambda: server.count("distkv_http_cancelled_total") == before + 1)
    assert server.openai().chat.completions.create(model="tiny", messages=USER).choices[0].message.content


def test_more_requests_than_are_taken_are_told_when_to_come_back(server: Served) -> None:
    client = server.openai()
    streams = [
        client.chat.completions.create(model="tiny", messages=USER, max_tokens=3900, stream=True, extra_body=LONG)
        for _ in range(server.serving.limits.open_requests)
    ]
    with pytest.raises(openai.RateLimitError) as caught:
        client.chat.completions.create(model="tiny", messages=USER)
    assert 1 <= int(caught.value.response.headers["retry-after"]) <= 60
    assert client.models.list().data  # requests that only read are not limited
    for stream in streams:
        stream.close()
    server.idle()
    until(lambda: server.count("distkv_http_open_requests") == 0)
    assert client.chat.completions.create(model="tiny", messages=USER).choices


def test_all_answers_to_one_prompt_are_choices_and_all_their_tokens_count() -> None:
    other = Completion("two", (3, 4, 5), 7, "length")
    done = Completion("one", (1, 2), 7, "stop", others=(other,), scores={"one": 0.75, "two": 0.25})
    for form in (ChatForm("m", Tokenizer(None, 9)), TextForm("m", Tokenizer(None, 9))):
        said = form.whole([done])
        assert [(one["index"], one["finish_reason"]) for one in said["choices"]] == [(0, "stop"), (1, "length")]
        assert said["choices"][0]["scores"] == {"one": 0.75, "two": 0.25}
        assert (said["usage"]["prompt_tokens"], said["usage"]["completion_tokens"]) == (7, 5)


@pytest.mark.parametrize(
    ("asked", "stream"),
    [
        ({"prompt_logprobs": 0}, True),
        ({"best_of": 2, "temperature": 1}, True),
        ({"choices": ["a", "b"]}, True),
    ],
    ids=str,
)
def test_what_an_answer_would_leave_out_is_refused(asked: dict[str, Any], stream: bool) -> None:
    with pytest.raises(InvalidRequestError, match=next(iter(asked))):
        check_written(SamplingParams(**asked), stream)


def test_figures_count_calls_and_tokens(server: Served) -> None:
    new, calls = (
        'distkv_http_tokens_total{kind="new"}',
        'distkv_http_requests_total{path="/v1/chat/completions",status="200"}',
    )
    before = server.count(new), server.count(calls)
    server.openai().chat.completions.create(model="tiny", messages=USER, max_tokens=7)
    assert (server.count(new), server.count(calls)) == (before[0] + 7, before[1] + 1)


def test_a_server_that_stops_ends_what_is_open_within_its_time_and_says_so(tmp_path: Path) -> None:
    got: list[object] = []
    with open_session(1) as session:
        with served(session, tmp_path, Limits(drain_seconds=0.5)) as server:
            begun = threading.Event()

            def ask() -> None:
                stream = server.openai().chat.completions.create(
                    model="tiny", messages=USER, max_tokens=2500, stream=True, extra_body=LONG
                )
                try:
                    for chunk in stream:
                        got.append(chunk.choices[0].delta.content)
                        begun.set()
                except openai.APIError as error:
                    got.append(error)

            thread = threading.Thread(target=ask)
            thread.start()
            assert begun.wait(60)
            server.server.stop()
            thread.join(60)
        assert "stopped before the answer was complete" in str(got[-1]), got[-1]
        assert session.submit("again", SamplingParams(max_new_tokens=2)).result(60).token_ids
        with pytest.raises(httpx.ConnectError):
            server.http().get("/health")


def test_an_engine_that_is_gone_is_a_sick_server(tmp_path: Path) -> None:
    with open_session(1) as session, served(session, tmp_path) as server:
        assert server.http(None).get("/health").status_code == 200
        session.close()
        assert server.http(None).get("/health").status_code == 503
        with pytest.raises(openai.InternalServerError, match="closed") as caught:
            server.openai().chat.completions.create(model="tiny", messages=USER)
        assert caught.value.status_code == 503


def test_without_keys_only_names_of_this_machine_are_answered(tmp_path: Path, server: Served) -> None:
    with served(server.serving.session, tmp_path, keys=frozenset()) as opened:
        http = opened.http(None)
        assert http.get("/v1/models").status_code == 200
        rebound = http.get("/v1/models", headers={"Host": "evil.example:8000"})
        assert (rebound.status_code, "no API keys" in rebound.json()["error"]["message"]) == (403, True)


def test_embeddings_are_those_of_the_engine_in_numbers_and_as_base64(server: Served) -> None:
    texts = ["Which river?", "Once upon a time"]
    ask = server.openai().embeddings.create
    found = ask(model="tiny", input=texts)  # the client asks for base64 and decodes it
    expected = server.serving.session.submit(texts[0], SamplingParams(embed="mean")).result(60)
    assert found.data[0].embedding == pytest.approx(expected.embedding.tolist(), abs=1e-5)
    assert [one.index for one in found.data] == [0, 1]
    assert (found.model, found.object) == ("tiny", "list")
    assert found.usage.prompt_tokens == found.usage.total_tokens == sum(map(len, texts))
    numbers = ask(model="tiny", input=texts[1], encoding_format="float", extra_body={"embed": "last"})
    expected = server.serving.session.submit(texts[1], SamplingParams(embed="last")).result(60)
    assert numbers.data[0].embedding == pytest.approx(expected.embedding.tolist(), abs=1e-5)
    unit = ask(model="tiny", input=[5, 6, 7], extra_body={"normalize": True}).data[0].embedding
    assert sum(one * one for one in unit) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"input": ""}, "empty"),
        ({"input": []}, "not empty"),
        ({"input": ["a", ""]}, "empty"),
        ({"input": [[1, 2], 3]}, "list of token ids"),
        ({"input": "a", "dimensions": 4}, "dimensions=4"),
        ({"input": "a", "encoding_format": "hex"}, "encoding_format"),
        ({"input": "a", "extra_body": {"embed": "max"}}, "embed is 'max'"),
        ({"input": "a", "extra_body": {"temperature": 1}}, "temperature"),
        ({"input": ["a"] * 4}, "takes 3 at once"),
        ({"input": "a" * 5000}, "longer than the model's window"),
    ],
)
def test_what_cannot_be_embedded_is_refused_and_named(server: Served, said: dict[str, Any], words: str) -> None:
    with pytest.raises(openai.BadRequestError, match=words):
        server.openai().embeddings.create(model="tiny", **said)
    with pytest.raises(openai.NotFoundError):
        server.openai().embeddings.create(model="other", input="a")
