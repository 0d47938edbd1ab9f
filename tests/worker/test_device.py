"""The device on which a worker computes, and its messages if that is not what a user would expect."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from distkv_dask.errors import DeviceError
from distkv_dask.worker import device_choice
from distkv_dask.worker.device import HOST
from distkv_dask.worker.device_choice import choose_device


@pytest.fixture(autouse=True)
def no_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(device_choice, "_sees_a_card", lambda: False)


def test_the_host_is_chosen_where_there_is_nothing_else() -> None:
    assert choose_device("auto") is HOST
    assert choose_device("cpu") is HOST
    assert (HOST.name, HOST.note, HOST.is_host) == ("cpu", "", True)


def test_a_card_that_torch_cannot_use_is_never_passed_over_in_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_choice, "_sees_a_card", lambda: True)
    found = choose_device("auto")
    assert found.is_host
    assert f"torch {torch.__version__} is built without CUDA" in found.note
    assert "distkv-dask[gpu]" in found.note


@pytest.mark.parametrize("visible", ["", "-1", "MIG-41b3c7f2-0000", "0", "GPU-4a6b"])
def test_a_card_that_was_asked_for_and_cannot_be_used_is_an_error(
    visible: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(DeviceError, match=r"distkv\.device is cuda, but .*(hides every card|without CUDA)"):
        choose_device("cuda")


@pytest.mark.parametrize(("version", "visible"), [("12.8", None), ("12.8", "MIG-41b3c7f2-0000")])
def test_a_torch_with_cuda_that_finds_no_card_says_where_to_look(
    version: str, visible: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "cuda", version)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(DeviceError, match="nvidia-smi") as caught:
        choose_device("cuda")
    assert (visible or "12.8") in str(caught.value)


@pytest.mark.parametrize("setting", ["cuda", "auto"])
@pytest.mark.parametrize("what", ["The NVIDIA driver on your system is too old", "CUDA-capable device(s) is/are busy"])
def test_a_card_that_cannot_be_opened_is_quoted(what: str, setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError(what)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", fail)
    monkeypatch.setattr(device_choice, "_sees_a_card", lambda: True)
    if setting == "auto":
        assert choose_device("auto").is_host
        assert what in choose_device("auto").note
        return
    with pytest.raises(DeviceError) as caught:
        choose_device("cuda")
    assert what in str(caught.value)


def test_a_worker_sees_cards_by_their_device_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(Path, "exists", lambda path: str(path) == "/dev/nvidia0")
    assert device_choice._sees_a_card()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert not device_choice._sees_a_card()


def test_buffers_of_the_host_are_the_same_on_both_sides() -> None:
    pair = HOST.pair((2, 3), torch.float32)
    assert pair.host is pair.there
    pair.host.fill_(7.0)
    pair.up()
    pair.down()
    assert torch.equal(pair.there, torch.full((2, 3), 7.0))
    values = torch.arange(3)
    assert HOST.put(values) is values
