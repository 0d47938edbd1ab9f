"""``distkv serve`` as a process: it answers, and shuts down cleanly on a signal."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from pathlib import Path

import openai
import pytest
from _served import KEY
from click.testing import CliRunner, Result
from distributed import Client, LocalCluster

from distkv_dask import Engine, SamplingParams
from distkv_dask.client.cli import main
from tests._models import text_model_dir


def call(*arguments: object, **environment: str) -> Result:
    return CliRunner(env={"DASK_SCHEDULER_ADDRESS": "", **environment}).invoke(main, ["serve", *map(str, arguments)])


def test_others_may_not_ask_without_a_key(tmp_path: Path) -> None:
    done = call("--host", "0.0.0.0", "--model", text_model_dir())
    assert (done.exit_code, "--api-keys" in done.output) == (1, True)
    done = call("--model", text_model_dir(), DISTKV_API_KEYS="short")
    assert (done.exit_code, "5 characters" in done.output) == (1, True)
    assert call("--api-keys", tmp_path / "none").exit_code == 2
    assert call("--max-body", "much").exit_code == 2


def test_a_port_that_is_taken_is_said_before_anything_starts() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = call("--port", taken.getsockname()[1], "--model", text_model_dir())
    assert (done.exit_code, "choose another" in done.output) == (1, True)


def test_a_server_that_is_terminated_finishes_what_is_open_and_leaves_the_engine_to_others(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(KEY)
    with (
        LocalCluster(
            n_workers=1, threads_per_worker=1, processes=False, protocol="tcp", dashboard_address=None
        ) as cluster,
        Client(cluster) as client,
        Engine(client, str(text_model_dir()), dtype="float32", kv_memory="8 MiB") as engine,
    ):
        arguments = [
            "--scheduler",
            cluster.scheduler_address,
            "--engine",
            "auto",
            "--port",
            "0",
            "--model-name",
            "tiny",
        ]
        code = "from distkv_dask.client.cli import main; main()"
        process = subprocess.Popen(
            [sys.executable, "-c", code, "serve", *arguments, "--api-keys", str(tmp_path / "keys")],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        try:
            assert process.stdout is not None
            url = process.stdout.readline().strip()
            asked = openai.OpenAI(base_url=url, api_key=KEY, max_retries=0)
            user = [{"role": "user", "content": "Hi"}]
            stream = asked.chat.completions.create(
                model="tiny", messages=user, stream=True, max_tokens=600, temperature=0
            )
            next(stream)
            process.send_signal(signal.SIGTERM)
            text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
            _, errors = process.communicate(timeout=60)
        finally:
            process.kill()
        assert process.returncode == 0, errors
        assert "Traceback" not in errors
        assert text == engine.generate([user], SamplingParams(max_new_tokens=600))[0].text
    with pytest.raises(openai.APIConnectionError):
        asked.models.list()
