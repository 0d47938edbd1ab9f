"""Layers from disk (LLM in a flash, arXiv 2312.11514): the next layer is read while one computes.

Two buffers take turns; a layer's weights are views of one of them. Weights outside of layers (embeddings, the head) and
weights that layers share stay in memory. Files are read, not mapped: so memory is bounded whatever the operating system
caches, and a truncated file is an error of the request instead of the end of the process.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from distkv_dask.errors import ModelError, UnsupportedModelError, in_words
from distkv_dask.worker.model.mapped import FileMaps

_LINE = 64
"""Bytes of a cache line: rounding may depend on a weight's place in one, so it has the same place as in its file."""
_AT_ONCE = 1 << 30
"""Maximum bytes of a read: Linux reads at most 2 GiB."""


class WeightFile:
    """A file of weights, open as long as the model is loaded; it must not change."""

    def __init__(self, path: str) -> None:
        self.path = path
        try:
            self._handle = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise ModelError(f"weights cannot be read from {path}: {in_words(error)}") from error
        weakref.finalize(self, os.close, self._handle)
        self._stamp = self._now()

    def read(self, offset: int, target: memoryview) -> None:
        """Fill memory with the bytes from an offset on.

        Raises
        ------
        ModelError
            The file was changed or cut short since it was opened, or cannot be read.
        """
        done = 0
        try:
            while done < len(target):
                count = os.preadv(self._handle, [target[done : done + _AT_ONCE]], offset + done)
                if not count:
                    break
                done += count
            unchanged = self._now() == self._stamp
        except OSError as error:
            raise ModelError(f"weights cannot be read from {self.path}: {in_words(error)}") from error
        if done < len(target) or not unchanged:
            raise ModelError(
                f"{self.path} was changed or cut short while an engine read weights from it: bring the file back, "
                "and open the engine again"
            )

    def _now(self) -> tuple[int, int]:
        stat = os.fstat(self._handle)
        return stat.st_size, stat.st_mtime_ns


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes of a file, and the memory into which they are read."""

    file: WeightFile
    offset: int
    target: memoryview


class DiskLayers:
    """The weights of a model's layers, read from disk whenever a layer is computed.

    Parameters
    ----------
    model
        A transformers model whose weights are mapped from files. It is changed in place: afterwards none is.

    Raises
    ------
    UnsupportedModelError
        Its layers are not in one list, or their weights are not mapped from files.
    """

    def __init__(self, model: Any) -> None:
        layers = layers_of(model)
        maps, files = FileMaps(), dict[str, WeightFile]()
        own = [_own_weights(layer, _uses(model)) for layer in layers]
        size = max(_size(weights) for weights in own)
        buffers = _room(size), _room(size)
        moved = {id(weight) for weights in own for weight in weights}
        self._layers: list[list[Piece]] = []
        with torch.inference_mode(False):
            for at, weights in enumerate(own):
                places = zip(weights, _places(weights, buffers[at % 2]), strict=True)
                self._layers.append([_move(weight, place, maps, files) for weight, place in places])
            for tensor in (*model.parameters(), *model.buffers()):
                if id(tensor) not in moved and maps.of(tensor) is not None:
                    tensor.data = _copied(tensor.data)
        self._sizes = [sum(len(piece.target) for piece in pieces) for pieces in self._layers]
        self._coming: tuple[int, Future[None]] | None = None
        self._taken: set[int] = set()
        for at, layer in enumerate(layers):
            layer.register_forward_pre_hook(partial(_before, self, at))
        layers[-1].register_forward_hook(partial(_after, self))

    @property
    def buffer_bytes(self) -> int:
        """Memory of both buffers."""
        return 2 * max(self._sizes)

    @property
    def saved_bytes(self) -> int:
        """Bytes of weights that are not in memory."""
        return max(0, sum(self._sizes) - self.buffer_bytes)

    def take_layer(self, layer: int) -> None:
        """Wait until a layer is in its buffer, and start reading the next one.

        Raises
        ------
        ModelError
            It could not be read.
        """
        if self._coming is None or self._coming[0] != layer:
            self.begin_reading(layer)
        assert self._coming is not None
        _, reading = self._coming
        self._coming = None  # a failed read is repeated
        reading.result()
        self._taken.add(layer)
        if layer + 1 < len(self._layers):
            self.begin_reading(layer + 1)

    def check_taken(self) -> None:
        """Check, after the model has run, that every layer was read before it was computed.

        Raises
        ------
        UnsupportedModelError
            A layer computed without having been read.
        """
        if len(self._taken) < len(self._layers):
            raise UnsupportedModelError(
                "this model does not call its layers in the usual way, so they cannot be read from disk: set "
                "distkv.weights to memory"
            )

    def begin_reading(self, layer: int) -> None:
        """Start reading a layer into its buffer, which must not be in use."""
        if self._coming is not None:
            self._coming[1].exception()  # a read for a failed step
        coming: Future[None] = Future()
        self._coming = layer, coming
        threading.Thread(target=_read, args=(self._layers[layer], coming), name="distkv-weights", daemon=True).start()


def layers_of(model: Any) -> nn.ModuleList:
    """The decoder layers of a transformers model.

    Raises
    ------
    UnsupportedModelError
        There is no list of them.
    """
    count = model.config.get_text_config().num_hidden_layers
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == count]
    if not lists:
        raise UnsupportedModelError(
            f"the layers of model type {model.config.model_type!r} are not in one list, so they cannot be read from "
            "disk: set distkv.weights to memory"
        )
    return max(lists, key=lambda one: sum(weight.numel() for weight in one.parameters()))


def _before(disk: DiskLayers, at: int, *_: Any) -> None:
    disk.take_layer(at)


def _after(disk: DiskLayers, *_: Any) -> None:
    disk.begin_reading(0)


def _read(pieces: list[Piece], done: Future[None]) -> None:
    """Read in a separate thread."""
    try:
        for piece in pieces:
            piece.file.read(piece.offset, piece.target)
    except BaseException as error:  # raised where it is awaited
        done.set_exception(error)
    else:
        done.set_result(None)


def _uses(module: nn.Module) -> Counter[int]:
    """How many times a module has each weight."""
    return Counter(id(weight) for _, weight in module.named_parameters(remove_duplicate=False))


def _own_weights(layer: nn.Module, uses: Counter[int]) -> list[nn.Parameter]:
    """The weights that only this layer has."""
    own = _uses(layer)
    return [weight for weight in layer.parameters() if own[id(weight)] == uses[id(weight)]]


def _size(weights: list[nn.Parameter]) -> int:
    return sum(_lines(weight) for weight in weights)


def _lines(weight: Tensor) -> int:
    """Bytes of a weight in whole cache lines, wherever it begins in one."""
    return (weight.nbytes // _LINE + 2) * _LINE


def _shift(weight: Tensor) -> int:
    """Where in a cache line a weight begins; 0 if its dtype cannot begin there."""
    shift = weight.data_ptr() % _LINE
    return 0 if shift % weight.itemsize else shift


def _copied(tensor: Tensor) -> Tensor:
    """A copy in memory, at the same place of a cache line."""
    room, start = _room(_lines(tensor)), _shift(tensor)
    copy = room[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
    return copy.copy_(tensor)


def _room(size: int) -> Tensor:
    """Memory of ``size`` bytes, aligned to a cache line."""
    whole = torch.zeros(size + _LINE, dtype=torch.uint8)
    first = -whole.data_ptr() % _LINE
    return whole[first : first + size]


def _places(weights: list[nn.Parameter], buffer: Tensor) -> Iterator[Tensor]:
    """A part of a buffer for each weight."""
    at = 0
    for weight in weights:
        start = at + _shift(weight)
        yield buffer[start : start + weight.nbytes]
        at += _lines(weight)


def _move(weight: nn.Parameter, place: Tensor, maps: FileMaps, files: dict[str, WeightFile]) -> Piece:
    """Let a weight be a view of a buffer; where its bytes are in a file."""
    part = maps.of(weight)
    if part is None or not weight.is_contiguous():
        raise UnsupportedModelError(
            "weights of this model are not used as they are stored, so layers cannot be read from disk: set "
            "distkv.weights to memory"
        )
    if part.path not in files:
        files[part.path] = WeightFile(part.path)
    offset = part.offset + weight.data_ptr() - part.start
    weight.data = place.view(weight.dtype).view(weight.shape)
    return Piece(files[part.path], offset, place.numpy().data)
