"""The fingerprint of a model: KV of one model is useless for another."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

SAMPLES = 64
"""Number of elements of each weight that are hashed."""
IGNORED = ("transformers_version", "dtype", "torch_dtype", "use_cache")


def fingerprint(model: Any, drop_pages: Callable[[Iterable[Tensor]], None] | None = None) -> str:
    """SHA-256 of a transformers model's configuration, and of some elements of every weight as it was loaded.

    Parameters
    ----------
    model
        The model.
    drop_pages
        Called with each weight once it was read.
    """
    config = {name: value for name, value in model.config.to_dict().items() if name[0] != "_" and name not in IGNORED}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    with torch.inference_mode():
        for name, weight in sorted(model.named_parameters()):
            some = weight.reshape(-1)[:: max(1, weight.numel() // SAMPLES)].float().cpu().contiguous()
            digest.update(f"{name} {tuple(weight.shape)}".encode() + some.numpy().tobytes())
            if drop_pages is not None:
                drop_pages([weight])
    return digest.hexdigest()
