"""Chooses a worker's device, and explains an unexpected choice."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch

from distkv_dask.errors import DeviceError, in_words
from distkv_dask.worker.card import Card
from distkv_dask.worker.device import HOST, Device

_INSTALL = "install distkv-dask[gpu] and a torch that was built for it (https://pytorch.org/get-started/locally)"


def choose_device(setting: str) -> Device:
    """The device of an engine of this process: on a card, one with separate streams.

    Parameters
    ----------
    setting
        ``distkv.device``: ``"cpu"``, ``"cuda"``, or ``"auto"``: the card that the process sees, if torch can use it.

    Raises
    ------
    DeviceError
        The setting is ``"cuda"``, and torch cannot use a card here.
    """
    if setting == "cpu":
        return HOST
    try:
        if torch.cuda.is_available():
            return Card()
        reason = _not_found()
    except Exception as error:  # an old driver, a broken card or a busy one raise different errors
        reason = f"torch {torch.__version__} cannot use the card: {in_words(error)}"
    if setting == "cuda":
        raise DeviceError(f"distkv.device is cuda, but {reason}")
    return Device(note=f"computes on the CPU: {reason}") if _sees_a_card() else HOST


def _not_found() -> str:
    """Why torch finds no card in this process, and what to do."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if _hides_all(visible):
        return f"CUDA_VISIBLE_DEVICES={visible!r} hides every card from this worker: give it one"
    if torch.version.cuda is None and getattr(torch.version, "hip", None) is None:
        return f"torch {torch.__version__} is built without CUDA: {_INSTALL}"
    seen = "" if visible is None else f" (CUDA_VISIBLE_DEVICES={visible!r})"
    return (
        f"torch {torch.__version__} finds no card{seen}: look with nvidia-smi whether the driver works and fits CUDA "
        f"{torch.version.cuda}"
    )


def _sees_a_card() -> bool:
    """Whether the machine has a card that is not hidden from this worker."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return not _hides_all(visible)
    return any(Path(one).exists() for one in ("/dev/nvidia0", "/dev/kfd")) or shutil.which("nvidia-smi") is not None


def _hides_all(visible: str | None) -> bool:
    """Whether a value of CUDA_VISIBLE_DEVICES hides all cards."""
    return visible is not None and visible.strip() in ("", "-1")
