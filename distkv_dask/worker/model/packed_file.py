"""Packed weights of a large model's linears: in a file that is written once per machine, and mapped by all its workers.

A worker has no room for a private copy of them (:mod:`.packed`). Mapped ones take no more than the weights did, because
the pages of these are released, and nothing reads them again: the core computes all numbers of rows that occur.
"""

from __future__ import annotations

import json
import logging
import math
import mmap
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial
from pathlib import Path

import torch
from filelock import Timeout
from torch import Tensor, nn

from distkv_dask.config import Config
from distkv_dask.errors import in_words
from distkv_dask.kernels.few_rows import INPUTS, OUTPUTS, packed, packed_shape
from distkv_dask.worker.model.host_files import host_file, is_there, lock_of, locked, make_room, put
from distkv_dask.worker.model.mapped import FileMaps, MappedPages
from distkv_dask.worker.model.packed import Choice, FewRowsLinear, linears_of

logger = logging.getLogger("distributed.distkv.opening")

FORM = 1
"""Version of the file's form."""
WAIT = 300.0
"""Seconds to wait for another process that writes the file: half of the time for opening an engine."""
AT_ONCE = 64 << 20
"""Bytes that are packed at once, in memory of this process."""


def usual_rows(config: Config) -> int:
    """Most rows that an engine computes at once, apart from rare steps: a prompt's chunk, or a batch that decodes.

    With ``speculation: auto`` steps of many more rows are rare, because they take longer than they save.
    """
    tried = config.speculation if isinstance(config.speculation, int) else 0
    return max(config.prefill_chunk_tokens, config.window_batch * (1 + tried))


def map_packed(model: nn.Module, room: int, rows: int, choose: Callable[[], Choice], key: object) -> Path | None:
    """Let a model's linears compute with packed weights from a file; nothing changes if it cannot be written.

    Parameters
    ----------
    model
        A model in host memory.
    room
        Maximum bytes that may be in memory in addition to what was: of packed weights whose original is used elsewhere,
        too (a head with the embedding's weight), or is not mapped from a file. Without room these stay as they are.
    rows
        Most rows that are usually computed at once. The core must serve as many, otherwise nothing is packed.
    choose
        Chooses the products.
    key
        Everything that the weights depend on, with a ``repr`` that is the same in all processes.

    Returns
    -------
    Path or None
        The file, if there is one.
    """
    linears = _without_doubles(model, room)
    few = (choice := choose()).few if linears else ()
    if not few or few[-1][0] < rows:
        if few:
            logger.info(
                "weights of a large model are not packed: the products of packed weights serve up to %d rows here, and "
                "steps have up to %d (distkv.prefill.chunk-tokens, distkv.window.batch)",
                *(few[-1][0], rows),
            )
        return None
    pages, weights = MappedPages(model), {name: linear.weight for name, linear in linears.items()}
    shapes = [(name, *weight.shape) for name, weight in weights.items()]
    file = host_file(("packed", FORM, OUTPUTS, INPUTS), (key, shapes))
    if (mapped := packed_once(weights, file, pages.drop_pages, _files_of(model))) is None:
        return None
    for name, linear in linears.items():
        linear.forward = FewRowsLinear(linear.weight, linear.bias, choice, mapped[name])  # type: ignore[assignment]
    pages.drop_pages(weights.values())  # the probe has read some
    return file


def packed_once(
    weights: Mapping[str, Tensor],
    file: Path,
    drop_pages: Callable[[Iterable[Tensor]], None],
    kept: Collection[Path] = (),
) -> dict[str, Tensor] | None:
    """Map packed weights from a file, after writing it if needed.

    Parameters
    ----------
    weights
        [outputs, inputs] each, bfloat16.
    file
        Where they are, or go.
    drop_pages
        Called with each weight once it was packed.
    kept
        Files that are not deleted to make room for this one.

    Returns
    -------
    dict or None
        None if that is not possible; the log says why.
    """
    try:
        with locked(file, WAIT):
            if not is_there(file):
                if reason := make_room(file.parent, _bytes(weights.values()), kept):
                    return _unpacked(reason)
                put(file, partial(_write, weights, drop_pages))
            return _read(weights, file)
    except Timeout:
        return _unpacked(f"another process of this machine has held {lock_of(file)} for {WAIT:.0f} s: end it")
    except OSError as error:
        return _unpacked(f"{file} cannot be written or read ({in_words(error)}): set XDG_CACHE_HOME")


def _unpacked(reason: str) -> dict[str, Tensor] | None:
    logger.warning("weights of a large model are not packed, so steps of few tokens take longer: %s", reason)
    return None


def _without_doubles(model: nn.Module, room: int) -> dict[str, nn.Linear]:
    """A model's linears, without those whose weights would be in memory twice if that takes more than ``room``."""
    maps = FileMaps()
    uses = Counter(id(weight) for _, weight in model.named_parameters(remove_duplicate=False))
    linears = {name: one for name, one in linears_of(model).items() if one.weight.dtype == torch.bfloat16}
    twice = {
        name: linear.weight
        for name, linear in linears.items()
        if uses[id(linear.weight)] > 1 or maps.of(linear.weight) is None
    }
    if _bytes(twice.values()) <= room:
        return linears
    return {name: linear for name, linear in linears.items() if name not in twice}


def _files_of(model: nn.Module) -> set[Path]:
    """The files from which a model's weights are mapped."""
    maps = FileMaps()
    return {Path(part.path) for weight in model.parameters() if (part := maps.of(weight)) is not None}


def _size(weight: Tensor) -> int:
    return weight.itemsize * math.prod(packed_shape(*weight.shape))


def _bytes(weights: Iterable[Tensor]) -> int:
    return sum(map(_size, weights))


def _write(weights: Mapping[str, Tensor], drop_pages: Callable[[Iterable[Tensor]], None], scratch: Path) -> None:
    """Write packed weights in the form of safetensors, a part of one at a time, because memory is short."""
    with scratch.open("wb") as file, torch.inference_mode():
        file.write(_header(weights))
        for weight in weights.values():
            panel = 2 * weight.shape[1] * OUTPUTS
            for some in weight.split(max(1, AT_ONCE // panel) * OUTPUTS):
                file.write(packed(some).view(torch.uint8).numpy().data)
            drop_pages([weight])


def _header(weights: Mapping[str, Tensor]) -> bytes:
    """What safetensors files begin with, padded so that weights begin with a page, and so with a cache line."""
    tensors, at = {}, 0
    for name, weight in weights.items():
        stop = at + _size(weight)
        tensors[name] = {"dtype": "BF16", "shape": packed_shape(*weight.shape), "data_offsets": [at, stop]}
        at = stop
    text = json.dumps(tensors).encode()
    text += b" " * (-(8 + len(text)) % mmap.PAGESIZE)
    return len(text).to_bytes(8, "little") + text


def _read(weights: Mapping[str, Tensor], file: Path) -> dict[str, Tensor] | None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        found = load_file(file)
    except SafetensorError as error:
        return _unpacked(f"{file} is damaged ({in_words(error)}): delete it")
    if {name: one.shape for name, one in found.items()} != {
        name: packed_shape(*weight.shape) for name, weight in weights.items()
    }:
        return _unpacked(f"{file} has other weights: delete it")
    return found
