"""A command that cannot do its work says so in one line, before it starts a cluster or loads a model."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dask
import distributed
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result

from distkv_dask.client.cli import main
from tests._models import model_dir, text_model_dir


class Started(BaseException):
    """An error that no code catches."""


@pytest.fixture(autouse=True)
def nothing_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    def started(*_: Any, **__: Any) -> None:
        raise Started

    monkeypatch.setattr(distributed, "LocalCluster", started)
    monkeypatch.setattr(distributed, "Client", started)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Valid and invalid values for a command line."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.txt").write_text("Profits rose.")
    (tmp_path / "a.txt").write_text("Profits rose.")
    (tmp_path / "blank.txt").write_text(" \n")
    (tmp_path / "utf16.txt").write_bytes(b"\xff\xfe\x00\xd8")
    (tmp_path / "broken.pdf").write_bytes(b"%PDF-1.7 nothing")
    (tmp_path / "notes.xyz").write_text("x")
    (tmp_path / "empty").mkdir()
    pq.write_table(pa.table({"text": ["a"], "title": ["b"]}), tmp_path / "t.parquet")
    (tmp_path / "half.parquet").write_bytes((tmp_path / "t.parquet").read_bytes()[:100])
    (tmp_path / "good.json").write_text(json.dumps({"type": "object", "properties": {"n": {"type": "integer"}}}))
    for name, schema in {"list": "[]", "text": "{", "never": '{"type": "integer", "minimum": 3, "maximum": 1}'}.items():
        (tmp_path / f"{name}.json").write_text(schema)
    body = {"messages": [{"role": "user", "content": "Hi"}]}
    request = {"custom_id": "a", "url": "/v1/chat/completions", "method": "POST", "body": body}
    (tmp_path / "requests.jsonl").write_text(json.dumps(request))
    (tmp_path / "taken.jsonl").write_text("mine")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "letter.txt").write_text("dear")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "trace.csv").write_text("TIMESTAMP,ContextTokens,GeneratedTokens\nnonsense,1,2\n")
    return tmp_path


def call(place: Path, command: str) -> Result:
    """Run a command line, in which ``@`` stands for the folder of this test and MODEL for a model."""
    words = [word.replace("@", str(place)) for word in command.split()]
    found = [str(text_model_dir()) if word == "MODEL" else word for word in words]
    return CliRunner().invoke(main, found)


RUN = "run @/t.parquet -o @/out --model MODEL"
LINES = "run @/requests.jsonl -o @/answers.jsonl --model MODEL"
BAD = {
    # paths
    "ask Who? @/missing.txt": "does not exist|No such file",
    "ask Who? @/docs": "is a folder",
    "ask Who? @/blank.txt": "is empty",
    "ask Who? @/utf16.txt": "not text|surrogate|cannot be read",
    "ask Who? @/broken.pdf": "cannot be read",
    "ask Who? s3-no://bucket/saved": "not a place",
    "ask  ": "QUESTION",
    "ask Who? --schema @/missing.json": "does not exist",
    "ask Who? --schema @/list.json": "JSON object",
    "ask Who? --schema @/text.json": "cannot be read",
    "ask Who? --schema @/never.json": "cannot be followed",
    "ask Who? --schema @/good.json --stop x": "leave out",
    "ask Who? --quotes": "no document to quote",
    "ask Who? --evidence": "no document to quote",
    "ask Who? @/a.txt --quotes --evidence": "give one of them",
    "ask Who? @/a.txt --quotes --regex a": "leave out the others",
    "ask Who? --regex (": "cannot be followed",
    "ask Who? --regex [^\\s\\S]": "no text matches",
    "ask Who? --regex a --stop x": "leave out",
    "ask Who? --regex a --schema @/good.json": "leave out the others",
    "ask Who? --grammar @/missing.lark": "does not exist",
    "ask Who? --grammar @/a.txt": "cannot be followed",
    "ask Who? --grammar @/utf16.txt": "cannot be read as text",
    "ingest @/missing.txt @/saved": "does not exist",
    "ingest s3://bucket/report.pdf @/saved": "not on this machine",
    "ask Who? file://@/missing.txt": "No such file",
    "ingest @/docs @/saved": "is a directory",
    "ingest @/blank.txt @/saved": "is empty",
    "ingest @/a.txt @/a.txt/saved": "cannot be|Not a directory",
    "ingest @/a.txt nonsense://x/y": "not a place",
    "run @/missing -o @/out": "does not exist",
    "run s3://bucket/t.parquet -o @/out": "not on this machine",
    "run https://example.org/t.csv -o @/out": "not on this machine",
    "run hdfs://[/t.csv -o @/out": "not on this machine",
    "run file://elsewhere/t.csv -o @/out": "not on this machine",
    "run file://@/missing -o @/out": "does not exist",
    "run @/notes.xyz -o @/out": "not of a kind that can be read",
    "run @/half.parquet -o @/out": "Parquet|cannot be read",
    "run @/empty -o @/out": "holds no documents",
    # questions
    f"{RUN} --template {{text}}{{nothing}}": "the source has only",
    f"{RUN} --template {{text": "cannot be read",
    f"{RUN} --template {{text:d}}": "cannot be filled in",
    f"{RUN} --template {{text}}{{question}}": "give a question",
    f"{RUN} --text-column body": "no column",
    f"{RUN} --keep body": "no column",
    f"{RUN} --too-long map-reduce": "needs a question",
    f"{RUN} -q Why? --overlap 3": "overlap is for too_long",
    f"{RUN} -q Why? --combine {{answers}}": "combine is for too_long",
    f"{RUN} --top-p 0.5": "for sampled answers",
    f"{RUN} --seed 1 --temperature 0": "for sampled answers",
    "ask Who? @/a.txt --seed 1 --model MODEL": "for sampled answers",
    "run @/docs -o @/out --model MODEL --keep title": "no columns such as 'title'",
    "run @/a.txt -o @/out --model MODEL --text-column body": "leave out text_column",
    "simulate --workload v2-short-1 --speedup 2": "is for --trace",
    "simulate --trace @/trace.csv --rate 2": "is for --workload",
    "simulate --trace @/trace.csv --seed 2": "is for --workload",
    f"{RUN} --schema @/never.json": "cannot be followed",
    f"{RUN} --schema @/list.json": "JSON object",
    f"{LINES} -q Who?": "own prompts",
    f"{LINES} --keep url": "leave out keep",
    f"{LINES} --too-long truncate-head": "leave out too_long",
    f"{LINES} --overlap 3": "leave out overlap",
    f"{LINES} --combine {{answers}}": "leave out combine",
    f"{LINES} --text-column body": "leave out text_column",
    f"{LINES} --schema @/good.json": "response_format",
    f"{LINES} --regex a": "response_format",
    f"{LINES} --evidence": "no documents to quote",
    f"{RUN} --quotes --stop x": "leave out",
    # outputs
    "run @/t.parquet -o s3://bucket/out --model MODEL": "not a folder on this machine",
    "run @/t.parquet -o memory://out --model MODEL": "not a folder on this machine",
    "run @/t.parquet -o file://elsewhere/out --model MODEL": "not a folder on this machine",
    "run @/t.parquet -o @/out.jsonl --model MODEL": "name a folder",
    "run @/t.parquet -o @/a.txt --model MODEL": "is a file",
    "run @/t.parquet -o @/a.txt/out --model MODEL": "cannot be written",
    "run @/t.parquet -o /proc/out --model MODEL": "cannot be written",
    "run @/t.parquet -o @/foreign --model MODEL": "letter.txt",
    "run @/t.parquet -o @/t.parquet --model MODEL": "the source",
    "run @/docs -o @/docs --model MODEL": "the source",
    "run @/docs -o @/docs/out --model MODEL": "the source",
    "run @/docs -o file://@/docs/out --model MODEL": "the source",
    "run @/requests.jsonl -o @/requests.jsonl --model MODEL": "the source",
    "run @/requests.jsonl -o @/taken.jsonl --model MODEL": "already exists",
    # model, cluster
    **{
        f"{command} {option}": words
        for command in (RUN, "ask Who?", "ingest @/a.txt @/saved", "bench", "cluster --load --port 0")
        for option, words in {
            "--model @/nowhere": "was not found|needs",
            "--model @/a.txt": "GGUF",
            "--model @/docs": "config.json",
            "--model @/model": "model_type|cannot be read",
            "--dtype float8": "float16",
            "--kv-memory much": "kv-memory",
            "--kv-memory -1": "kv-memory",
            "--memory-limit much": "amount of memory",
            "--memory-limit -1GB": "amount of memory",
            "--rope-scaling dynamic:2": "rope-scaling",
            "--rope-scaling yarn:0.5": "rope-scaling",
            "--workers 0": "workers",
            "--threads none": "threads",
        }.items()
    },
    **{
        f"{command} --scheduler {address}": words
        for command in (RUN, "ask Who?", "ingest @/a.txt @/saved", "bench", "status", "documents")
        for address, words in {
            "nowhere": "not a scheduler address",
            "tcp://host": "not a scheduler address",
            "tcp://host:port": "not a scheduler address",
            "tcp://:8786": "not a scheduler address",
            "tcp://host:99999": "not a scheduler address",
            "smoke://host:1": "not a scheduler address",
            "tls://host:8786": "needs certificates",
        }.items()
    },
    "cluster --model MODEL": "--load",
    "cluster --host no.such.host.invalid": "nothing can listen",
    "bench --plot @/no/such.svg": "cannot be written",
    "bench --json @/docs": "cannot be written",
    "simulate --workload v2-short-1 --plot @/no/such.svg": "cannot be written",
    "simulate --workload v2-short-1 --json @/docs": "cannot be written",
    "simulate --workload v2-short-1 --rate 0": "above 0",
    "simulate --workload v2-short-1 --rate nan": "above 0",
    "simulate --workload v2-short-1 --seed -1": "seed",
    "simulate --workload nothing": "not a workload",
    "simulate --trace @/trace.csv": "request 1",
    "simulate --trace @/trace.csv --speedup 0": "above 0",
    "simulate --trace @/docs": "is a directory",
}


@pytest.mark.parametrize("command", BAD)
def test_a_command_that_cannot_be_done_starts_nothing(
    place: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("DASK_SCHEDULER_ADDRESS", raising=False)
    if any(word in command for word in ("--schema @/n", "--schema @/g", "--regex", "--grammar")):
        pytest.importorskip("llguidance", reason="llguidance is not installed (extra: schema)")
    before = {path: path.stat().st_mtime_ns for path in place.rglob("*")}
    done = call(place, command)
    assert done.exit_code in (1, 2), (done.output, done.exception)
    assert re.search(BAD[command], done.output), done.output
    assert "Traceback" not in done.output
    left = {path: path.stat().st_mtime_ns for path in place.rglob("*") if path.is_file()}
    assert left == {path: at for path, at in before.items() if path.is_file()}, "something was written"
    if "saved" not in command:
        assert {path for path in place.rglob("*")} == set(before)


@pytest.mark.parametrize(
    "command",
    [
        f"{RUN} -q Who?",
        f"{RUN} --schema @/good.json",
        f"{RUN} --regex [a-c]+",
        f"{RUN} -q Who? --evidence",
        LINES,
        "run @/docs -o file://@/out --model MODEL",
        "run file://@/t.parquet -o @/out --model MODEL",
        f"{LINES} --temperature 0 --seed 7",
        f"{RUN} -q Who? --temperature 1 --seed 7 --top-p 0.5",
        f"{RUN} -q Who? --too-long map-reduce --overlap 3 --combine {{answers}}",
        "run @/a.txt -o @/out --model MODEL --text-column body --template {body}",
        "ask Who? file://@/a.txt --model MODEL",
        "ingest file://@/a.txt @/saved --model MODEL",
        "ask Who? @/a.txt --model MODEL",
        "ask Who? --model MODEL --scheduler 127.0.0.1:8786",
        "ingest @/a.txt @/saved --model MODEL",
        "bench --model MODEL --json @/f.json --plot @/p.svg",
        "cluster --load --model MODEL --port 0",
        "status --scheduler tcp://[::1]:8786",
        "documents --scheduler tcp://host:8786",
    ],
)
def test_a_command_that_can_be_done_starts(place: Path, command: str) -> None:
    with pytest.raises(Started):
        call(place, command)
    assert not (place / "out").exists()


@pytest.fixture
def certificates(tmp_path: Path) -> Iterator[None]:
    names = ("ca-file", "client.cert", "scheduler.cert", "worker.cert")
    with dask.config.set({f"distributed.comm.tls.{name}": str(tmp_path / "no.pem") for name in names}):
        yield


@pytest.mark.usefixtures("certificates")
@pytest.mark.parametrize("command", ["status", "bench --model MODEL", "ask Who? --model MODEL"])
def test_certificates_that_are_not_there_are_told(place: Path, command: str) -> None:
    done = call(place, f"{command} --scheduler tls://127.0.0.1:8786")
    assert (done.exit_code, "distributed.comm.tls" in done.output) == (1, True), done.output


@pytest.mark.parametrize("command", ["status", "bench --model MODEL", "cluster --port 0", RUN])
def test_a_wrong_configuration_is_told(place: Path, command: str) -> None:
    with dask.config.set({"distkv.block-tokens": 7}):
        done = call(place, command + (" --scheduler tcp://h:1" if command == "status" else ""))
    assert (done.exit_code, "block-tokens" in done.output) == (1, True), done.output


def test_a_port_in_use_is_told(place: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = call(place, f"cluster --port {taken.getsockname()[1]}")
    assert (done.exit_code, "choose another" in done.output) == (1, True), done.output


def test_a_model_without_a_tokenizer_is_not_asked_with_texts(place: Path) -> None:
    for command in ("ask Who? --model", f"{RUN.removesuffix(' MODEL')}", "ingest @/a.txt @/saved --model"):
        done = call(place, f"{command} {model_dir('llama-gqa')}")
        assert (done.exit_code, "no tokenizer" in done.output) == (1, True), done.output


def test_an_output_of_another_batch_is_told_before_anything_starts(place: Path) -> None:
    from distkv_dask.client.batch.job import parameters_of
    from distkv_dask.client.batch.output import Output
    from distkv_dask.client.batch.results import Results
    from distkv_dask.client.batch.sources import source_for
    from distkv_dask.client.batch.spec import BatchSpec
    from distkv_dask.models.source import resolve_model

    spec = BatchSpec(questions=("Who?",))
    schema = Results(source_for(place / "t.parquet", spec, None, None), spec, None).schema
    with Output(place / "out", schema, parameters_of(spec, resolve_model(str(text_model_dir())), "auto")):
        done = call(place, f"{RUN} -q Who?")
        assert "being written to" in done.output
    with pytest.raises(Started):
        call(place, f"{RUN} -q Who?")
    drawn = {"--temperature 1 --seed 7": "seed was"}
    for option, words in {"-q Why?": "questions was", "--dtype float32": "dtype was", **drawn}.items():
        done = call(place, f"{RUN} {option if option.startswith('-q') else f'-q Who? {option}'}")
        assert (done.exit_code, words in done.output) == (1, True), done.output
