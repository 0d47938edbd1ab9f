"""Log probabilities, scores of choices and several answers in tables, OpenAI batch files and on the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from distributed import Client, Scheduler, Worker

from distkv_dask import Engine, SamplingParams
from distkv_dask.client.commands.options import sampling_of, sampling_options
from distkv_dask.sampling import YES_NO
from tests._cluster import engine_test
from tests._models import text_model_dir

SMALL: dict[str, Any] = {"dtype": "float32", "block_tokens": 8, "prefill_chunk_tokens": 32}


def test_a_table_has_typed_columns_for_what_is_asked_beside_the_answer(tmp_path: Path) -> None:
    source = pa.table({"text": ["one", "two and a half"], "id": [1, 2]})
    lines = [
        {"n": 2, "logprobs": True, "top_logprobs": 2, "max_tokens": 3, "seed": 1},
        {"structured_outputs": {"choice": ["aa", "b"]}, "temperature": 0, "prompt_logprobs": 1},
        {"max_tokens": 2},
    ]
    asked = [
        {"custom_id": str(at), "method": "POST", "url": "/v1/chat/completions", "body": one | {"messages": MESSAGES}}
        for at, one in enumerate(lines)
    ]
    (tmp_path / "asked.jsonl").write_text("\n".join(map(json.dumps, asked)))

    @engine_test(1)
    async def run(client: Client, scheduler: Scheduler, *workers: Worker) -> None:
        async with Engine(client, str(text_model_dir(end=True)), **SMALL) as engine:
            chosen = SamplingParams(choices=YES_NO, prompt_logprobs=1)
            await engine.process(source, question="Is it?", sampling=chosen, out=tmp_path / "scores")
            drawn = SamplingParams(max_new_tokens=4, ignore_eos=True, logprobs=2, n=2, temperature=1.0, seed=1)
            await engine.process(source, question="Why?", sampling=drawn, out=tmp_path / "drawn")
            await engine.process(tmp_path / "asked.jsonl", out=tmp_path / "answers.jsonl")

    run()
    for row in pq.read_table(tmp_path / "scores").to_pylist():
        assert row["error"] is None
        assert row["answer"] in YES_NO
        scores = dict(row["scores"])
        assert sum(scores.values()) == pytest.approx(1)
        assert row["score"] == scores["Yes"]
        assert row["prompt_logprobs"][0] is None
        assert len(row["prompt_logprobs"]) == row["prompt_tokens"]
    for row in pq.read_table(tmp_path / "drawn").to_pylist():
        assert row["answers"][0] == row["answer"]
        assert len(row["answers"]) == 2
        assert [len(one["best"]) for one in row["logprobs"]] == [2] * 4
        assert row["new_tokens"] == 8
    several, choice, plain = map(json.loads, (tmp_path / "answers.jsonl").read_text().splitlines())
    first, second = several["response"]["body"]["choices"]
    assert (first["index"], second["index"]) == (0, 1)
    assert len(first["logprobs"]["content"][0]["top_logprobs"]) == 2
    (chosen,) = choice["response"]["body"]["choices"]
    assert chosen["message"]["content"] == max(chosen["scores"], key=chosen["scores"].__getitem__)
    assert chosen["prompt_logprobs"][0] is None
    assert plain["response"]["body"]["choices"][0]["logprobs"] is None


MESSAGES = [{"role": "user", "content": "Hi"}]
OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "choices": ("--choices yes,no", {"choices": ("yes", "no")}),
    "choices with commas": ('--choices \'["a, b", "c"]\'', {"choices": ("a, b", "c")}),
    "score": ("--score", {"choices": YES_NO}),
    "logprobs": ("--logprobs 3 --prompt-logprobs 0", {"logprobs": 3, "prompt_logprobs": 0}),
    "several": ("-n 2 --best-of 4 --temperature 1", {"n": 2, "best_of": 4, "temperature": 1.0}),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_of_commands_say_the_same(name: str) -> None:
    line, expected = OPTIONS[name]
    found: list[SamplingParams] = []

    @click.command()
    @sampling_options
    def command(**options: Any) -> None:
        found.append(sampling_of(options)[0])

    done = CliRunner().invoke(command, line)
    assert done.exit_code == 0, done.output
    assert found == [SamplingParams(**expected)]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--choices a,,b", "not empty"),
        ("--choices a,a", "twice"),
        ("--choices '[1'", "not a JSON"),
        ("--score --choices a,b", "its own choices"),
        ("-n 2", "temperature"),
    ],
)
def test_options_that_make_no_sense_are_refused(line: str, words: str) -> None:
    @click.command()
    @sampling_options
    def command(**options: Any) -> None:
        sampling_of(options)

    done = CliRunner().invoke(command, line)
    assert done.exit_code != 0
    assert words in done.output
