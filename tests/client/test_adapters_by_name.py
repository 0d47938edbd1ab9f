"""Adapters in batches, commands and behind OpenAI's API: each row has its own, and only names lead to them."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import openai
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from _served import open_session, served
from click.testing import CliRunner
from distributed import Client, LocalCluster, Scheduler, Worker

from distkv_dask import Engine, InvalidRequestError, OutputError, SamplingParams
from distkv_dask.client.cli import main
from distkv_dask.errors import AdapterError
from tests._cluster import engine_test
from tests._models import text_model_dir

pytest.importorskip("peft")
from tests._adapters import save_adapter

TINY: dict[str, Any] = {"dtype": "float32", "kv_memory": "8 MiB", "block_tokens": 8, "prefill_chunk_tokens": 256}
TEXTS = [f"Report {number}: {'profits rose. ' * number}" for number in range(4)]


def few(adapter: Path | None = None, **more: Any) -> SamplingParams:
    return SamplingParams(max_new_tokens=6, ignore_eos=True, adapter=adapter, **more)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return [save_adapter(text_model_dir(), folder / name, seed) for seed, name in enumerate(("one", "two"))]


def chat(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_every_row_of_a_batch_is_answered_with_its_own_adapter(adapters: list[Path], tmp_path: Path) -> None:
    places = [str(adapters[0]), None, str(adapters[1]), str(tmp_path / "nowhere")]
    table = pa.table({"text": TEXTS, "lora": places})

    @engine_test(workers=2)
    async def run(client: Client, scheduler: Scheduler, *workers: Worker) -> None:
        async with Engine(client, str(text_model_dir()), **TINY) as engine:
            wanted = await engine.generate(
                [chat(f"{text}\n\n{question}") for text in TEXTS[:3] for question in ("Who?", "Why?")],
                [few(Path(place) if place else None) for place in places[:3] for _ in range(2)],
            )
            done = await engine.process(
                table, questions=["Who?", "Why?"], out=tmp_path / "out", adapter_column="lora", sampling=few()
            )
            assert (done.rows, done.errors) == (8, 2)
            found = pq.read_table(tmp_path / "out").sort_by([("row", "ascending"), ("question", "ascending")])
            rows = found.to_pylist()
            assert [one["answer"] for one in rows[:6]] == [one.text for one in wanted]
            assert all("there is no adapter" in one["error"] for one in rows[6:])
            assert len({one.text for one in wanted}) == 6, "adapters make a difference"
            plan = await engine.estimate(table, question="Who?", adapter_column="lora", sampling=few())
            assert (plan.refused, plan.refused_rows[0].label) == (1, 3)

    run()


def test_a_batch_with_a_bad_adapter_does_not_begin_and_one_with_another_does_not_go_on(
    adapters: list[Path], tmp_path: Path
) -> None:
    changing = Path(shutil.copytree(adapters[0], tmp_path / "changing"))
    foreign = Path(shutil.copytree(adapters[0], tmp_path / "foreign"))
    config = json.loads((foreign / "adapter_config.json").read_text()) | {"target_modules": ["q_proj"]}
    (foreign / "adapter_config.json").write_text(json.dumps(config))

    @engine_test(workers=1)
    async def run(client: Client, scheduler: Scheduler, *workers: Worker) -> None:
        async with Engine(client, str(text_model_dir()), **TINY) as engine:
            table, out = pa.table({"text": TEXTS}), tmp_path / "out"
            for bad in (tmp_path / "nowhere", foreign):
                with pytest.raises(AdapterError):
                    await engine.process(table, out=out, sampling=few(bad))
            assert not out.exists()
            await engine.process(table, out=out, sampling=few(changing))
            assert (await engine.process(table, out=out, sampling=few(changing))).earlier == 4
            shutil.rmtree(changing)
            shutil.copytree(adapters[1], changing)
            with pytest.raises(OutputError, match="other parameters"):
                await engine.process(table, out=out, sampling=few(changing))
            with pytest.raises(InvalidRequestError, match="adapter_column is 'lora'"):
                await engine.process(table, out=tmp_path / "b", adapter_column="lora", sampling=few())

    run()


def call(*arguments: object) -> Any:
    return CliRunner().invoke(main, [str(one) for one in arguments])


def test_commands_take_adapters(adapters: list[Path], tmp_path: Path) -> None:
    (tmp_path / "report.txt").write_text(TEXTS[3])
    pq.write_table(pa.table({"text": TEXTS}), tmp_path / "table.parquet")
    common = ["--model", text_model_dir(), "--dtype", "float32", "--kv-memory", "8 MiB", "--adapter", adapters[0]]
    with (
        LocalCluster(n_workers=1, threads_per_worker=1, processes=False, dashboard_address=None) as cluster,
        Client(cluster) as client,
    ):
        common += ["--scheduler", cluster.scheduler_address]
        with Engine(client, str(text_model_dir()), dtype="float32", kv_memory="8 MiB") as engine:
            sampling = SamplingParams(max_new_tokens=6, adapter=adapters[0])
            wanted = [one.text for one in engine.generate([chat(f"{text}\n\nWho?") for text in TEXTS], sampling)]
        done = call("ask", "Who?", tmp_path / "report.txt", "--max-new-tokens", 6, *common)
        assert (done.exit_code, done.output) == (0, wanted[3] + "\n")
        done = call("ingest", tmp_path / "report.txt", tmp_path / "saved", *common)
        assert done.exit_code == 0, done.output
        done = call("ask", "Who?", tmp_path / "saved", "--max-new-tokens", 6, *common)
        assert (done.exit_code, done.output) == (0, wanted[3] + "\n")
        out = tmp_path / "out"
        done = call("run", tmp_path / "table.parquet", "-q", "Who?", "-o", out, "--max-new-tokens", 6, *common)
        assert done.exit_code == 0, done.output
        assert pq.read_table(out).sort_by("row")["answer"].to_pylist() == wanted
    done = call("ask", "Who?", "--adapter", tmp_path / "nowhere")
    assert done.exit_code == 1
    assert "there is no adapter" in done.output
    done = call("serve", "--adapter", str(adapters[0]))
    assert done.exit_code == 2
    assert "is not a name and a folder" in done.output


@pytest.mark.thorough
def test_clients_of_a_server_ask_for_adapters_by_name_only(adapters: list[Path], tmp_path: Path) -> None:
    names = {"first": str(adapters[0]), "second": str(adapters[1])}
    with open_session() as session, served(session, tmp_path, adapters=names) as server:
        client, user = server.openai(), chat("Which river?")

        def wanted(place: str | None) -> str:
            return session.submit(user, SamplingParams(max_new_tokens=16, adapter=place)).result(60).text

        assert [one.id for one in client.models.list()][-2:] == ["first", "second"]
        assert client.models.retrieve("first").parent == "tiny"
        for name, place in (("tiny", None), *names.items()):
            done = client.chat.completions.create(model=name, messages=user)
            assert (done.choices[0].message.content, done.model) == (wanted(place), name)
            pieces = client.chat.completions.create(model=name, messages=user, stream=True)
            assert "".join(one.choices[0].delta.content or "" for one in pieces) == wanted(place)
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(model="third", messages=user)
        with pytest.raises(openai.BadRequestError, match="adapter"):
            client.chat.completions.create(model="tiny", messages=user, extra_body={"adapter": str(adapters[0])})
        lines = [
            {"custom_id": name, "method": "POST", "url": "/v1/chat/completions",
             "body": {"model": name, "messages": user, "temperature": 0}}
            for name in ("tiny", *names)
        ]  # fmt: skip
        lines.append(lines[0] | {"custom_id": "path", "body": lines[0]["body"] | {"adapter": str(adapters[0])}})
        (tmp_path / "requests.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
        file = client.files.create(file=tmp_path / "requests.jsonl", purpose="batch")
        batch = client.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h")
        deadline = time.monotonic() + 60
        while (batch := client.batches.retrieve(batch.id)).status != "completed":
            assert time.monotonic() < deadline, batch
            time.sleep(0.1)
        answers = [json.loads(line) for line in client.files.content(batch.output_file_id).text.splitlines()]
        found = {one["custom_id"]: one["response"]["body"] for one in answers}
        for name, place in (("tiny", None), *names.items()):
            assert found[name]["choices"][0]["message"]["content"] == wanted(place)
        assert "path" not in found
