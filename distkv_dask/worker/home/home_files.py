"""What only a home has of a sequence, in files: states of recurrent layers, and KV of layers that see a window.

A state is one row of bytes, a window has its blocks. How many bytes they have is known from the model, as for other
blocks (:mod:`~distkv_dask.worker.blocks.storage`), so nothing is read by what a file says of itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch

from distkv_dask.errors import SavedDocumentError
from distkv_dask.folder import Folder
from distkv_dask.messages.names import SavedFile, SpilledFile
from distkv_dask.watch import Watch
from distkv_dask.worker.blocks.storage import (
    file_name,
    read_blocks,
    read_rows,
    write_batches,
    write_blocks,
)
from distkv_dask.worker.device import HOST, Device, Use
from distkv_dask.worker.home.home_state import HomeState

STATE, WINDOW = "state", "window"
"""What names of such files begin with."""


class HomeFiles:
    """States and windows of one engine on one worker, to files and back.

    Parameters
    ----------
    kept
        What its home has.
    template
        A state, whose tensors have the sizes of all; empty where the model has no recurrent layers.
    device
        Where states are.
    """

    def __init__(self, kept: HomeState, template: Mapping[Any, torch.Tensor], device: Device = HOST) -> None:
        self._states = kept.states
        self._windows = kept.windows
        self._template = dict(sorted(template.items()))
        self._device = device

    def write(self, sequence: int, tokens: int, folder: Folder, tag: str, watch: Watch) -> Iterator[SavedFile]:
        """Save what a sequence has here after so many tokens as new files of a folder, as they are asked for.

        Raises
        ------
        SavedDocumentError
            A file cannot be written.
        StateLostError
            It is not here.
        """
        if self._template:
            state = self._states.kept(sequence, tokens)
            row = np.concatenate([self._bytes(state[slot]) for slot in self._template])[None]
            name = file_name(tag, 0, tokens, STATE)
            yield SavedFile(name, 0, tokens, *write_batches([row], row.size, folder, name, watch, True))
        if self._windows is not None:
            pool, start = self._windows.pool, self._windows.kept(sequence, tokens)
            name = file_name(tag, start, tokens, WINDOW)
            yield write_blocks(pool, sequence, start, tokens, folder, name, watch, True)

    def read(
        self, sequence: int, tokens: int, folder: Folder, files: Iterable[SavedFile | SpilledFile], watch: Watch
    ) -> None:
        """Have here what files say of a sequence after so many tokens.

        Raises
        ------
        SavedDocumentError
            A file is missing or damaged; the message says which and what is wrong.
        """
        named = {file.name.partition("-")[0]: file for file in files}
        if self._template:
            file, size = _named(named, STATE, 0, tokens), sum(one.nbytes for one in self._template.values())
            (row,) = read_rows(folder, file, size, tokens, 0, 1, watch)
            with watch.change():
                self._states.put(sequence, tokens, self._state(row))
        if self._windows is not None:
            file = _named(named, WINDOW, self._windows.first(tokens), tokens)
            with watch.change():
                self._windows.put(sequence, tokens)
            read_blocks(self._windows.pool, sequence, file.start, tokens, folder, file, watch)

    def _state(self, row: np.ndarray) -> dict[Any, torch.Tensor]:
        """A state of its bytes, uint8 [n]."""
        state, at = {}, 0
        for slot, like in self._template.items():
            state[slot] = made = torch.empty_like(like, memory_format=torch.contiguous_format)
            self._device.write(made.view(-1).view(torch.uint8), row[at : at + like.nbytes])
            at += like.nbytes
        return state

    def _bytes(self, tensor: torch.Tensor) -> np.ndarray:
        """Bytes of a tensor, uint8 [n]."""
        with self._device.stream(Use.COPIES):
            flat = tensor.contiguous().view(-1).view(torch.uint8)
            self._device.finish()
        return self._device.read(flat)


def _named(files: Mapping[str, SavedFile | SpilledFile], kind: str, start: int, stop: int) -> SavedFile | SpilledFile:
    file = files.get(kind)
    if file is None or (file.start, file.stop) != (start, stop):
        raise SavedDocumentError(
            f"the document has no {kind} of layers after {stop} tokens, without which its model cannot go on: ingest "
            "its source again"
        )
    return file
