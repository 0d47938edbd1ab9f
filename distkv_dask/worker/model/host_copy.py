"""Weights that cannot be mapped from their checkpoint, shared by a machine's processes through a converted file.

Weights in a checkpoint's own dtype and form are mapped, so processes of one machine share their pages. If they are
converted to another dtype, or joined (experts), each process would have its own copy. So the first process writes its
copy to the user's cache directory, and all of them map this file.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from filelock import Timeout
from torch import Tensor

from distkv_dask.errors import ModelError, in_words
from distkv_dask.worker.model.fingerprint import fingerprint
from distkv_dask.worker.model.host_files import host_file, is_there, lock_of, locked, make_room, put
from distkv_dask.worker.model.mapped import FileMaps

logger = logging.getLogger("distributed.distkv.opening")

LEAST = 16 << 20
"""Minimum bytes of unshared weights for which a file is written."""

WAIT = 600.0
"""Seconds to wait for another process that writes the file."""

ALONE = "of this process alone: "
"""Start of the note on weights that are not mapped from a file, before the reason."""

_COLUMNS = "columns:"
"""Prefix of matrices with contiguous columns, which are written transposed."""

_FORM = 1
"""Version of the file's form."""

Read = Callable[[Mapping[str, Tensor] | None], Any]
"""Loads a transformers model: from its checkpoint, or from tensors under the names of its weights."""


def loaded_once(read: Read, name: str, key: object) -> tuple[Any, str]:
    """Load a model so that processes of this machine share its weights.

    Parameters
    ----------
    read
        Loads it.
    name
        The model's name in messages.
    key
        Everything that its weights depend on, with a ``repr`` that is the same in all processes.

    Returns
    -------
    model, where
        The model, and where its weights are, in words.

    Raises
    ------
    ModelError
        Another process has been loading it for :data:`WAIT` seconds.
    """
    file = host_file(_FORM, key)
    try:
        with locked(file, WAIT):
            return _first_or_mapped(read, file)
    except Timeout as error:
        raise ModelError(
            f"another process of this machine has been loading model {name!r} for {WAIT:.0f} s, and still holds "
            f"{lock_of(file)}: end it, or choose another XDG_CACHE_HOME"
        ) from error
    except OSError as error:
        return _alone(read(None), f"{file.parent} cannot be written ({in_words(error)}): set XDG_CACHE_HOME")


def own_bytes(model: torch.nn.Module) -> int:
    """Bytes of a model's weights that are not mapped from files, and so in memory once for each process.

    0 if the operating system does not report it (outside Linux).
    """
    maps = FileMaps()
    return sum(weight.nbytes for weight in model.parameters() if maps.of(weight) is None) if maps.are_known else 0


def _first_or_mapped(read: Read, file: Path) -> tuple[Any, str]:
    """While holding the lock: map the file, after writing it if needed."""
    if is_there(file):
        return read(_tensors(file)), _mapped(file)
    model = read(None)
    if own_bytes(model) < LEAST:
        return model, "mapped from the checkpoint"
    if getattr(model, "hf_quantizer", None) is not None:
        return _alone(model, "they are quantized")
    form = _form(model)
    tensors = {name: tensor for name, tensor in _persistent(model)}
    if reason := make_room(file.parent, sum(tensor.nbytes for tensor in tensors.values())):
        return _alone(model, reason)
    put(file, partial(_write, tensors))
    del model, tensors  # otherwise the weights would be in memory twice
    model = read(_tensors(file))
    if _form(model) == form:
        return model, _mapped(file)
    file.unlink()  # transformers converts weights of these names again
    return _alone(read(None), "transformers does not read them back unchanged")


def _mapped(file: Path) -> str:
    return f"mapped from {file}"


def _alone(model: Any, reason: str) -> tuple[Any, str]:
    where = f"{ALONE}{reason}"
    logger.warning("weights of a model are %s", where)
    return model, where


def _form(model: Any) -> tuple[object, ...]:
    """Properties that show whether a model was read back as it was written."""
    return fingerprint(model), *((name, weight.dtype, weight.shape) for name, weight in model.named_parameters())


def _persistent(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Weights and buffers that belong to a checkpoint, as they are in memory; tied ones under one name only."""
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            plain = tensor.detach()
            if plain.is_contiguous() or plain.dim() != 2:
                yield name, plain.contiguous()
            else:
                yield _COLUMNS + name, plain.t().contiguous()


def _tensors(file: Path) -> dict[str, Tensor]:
    """Map a file."""
    from safetensors.torch import load_file

    return {
        name.removeprefix(_COLUMNS): tensor.t() if name.startswith(_COLUMNS) else tensor
        for name, tensor in load_file(file).items()
    }


def _write(tensors: dict[str, Tensor], scratch: Path) -> None:
    from safetensors.torch import save_file

    save_file(tensors, scratch)
