"""Files of what only a home has of a sequence: states of recurrent layers, and KV of layers that see a window.

A state is one row of bytes, a window has its blocks. Their sizes are known from the model, as for other blocks
(:mod:`~distkv_dask.worker.blocks.storage`), so no size in a file's own metadata is trusted.
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
    read_rows,
    write_batches,
    write_blocks,
)
from distkv_dask.worker.device import HOST, Device, Use
from distkv_dask.worker.home.home_state import HomeState

STATE, WINDOW = "state", "window"
"""Prefixes of the names of such files."""

File = SavedFile | SpilledFile


class HomeFiles:
    """States and windows of one engine on one worker, to files and back.

    Parameters
    ----------
    kept
        What the home has in memory.
    template
        A state, whose tensors have the sizes of all; empty if the model has no recurrent layers.
    device
        Where states are.
    """

    def __init__(self, kept: HomeState, template: Mapping[Any, torch.Tensor], device: Device = HOST) -> None:
        self._states = kept.states
        self._windows = kept.windows
        self._template = dict(sorted(template.items()))
        self._device = device

    def write(
        self, sequence: int, tokens: int, folder: Folder, tag: str, watch: Watch, durable: bool = True
    ) -> Iterator[SavedFile]:
        """Save what a sequence has here after ``tokens`` tokens as new files of a folder, one per iteration.

        Raises
        ------
        SavedDocumentError
            A file cannot be written.
        StateLostError
            This worker does not have it.
        """
        if self._template:
            state = self._states.kept(sequence, tokens)
            row = np.concatenate([self._bytes(state[slot]) for slot in self._template])[None]
            name = file_name(tag, 0, tokens, STATE)
            yield SavedFile(name, 0, tokens, *write_batches([row], row.size, folder, name, watch, durable))
        if self._windows is not None:
            pool, start = self._windows.pool, self._windows.kept(sequence, tokens)
            name = file_name(tag, start, tokens, WINDOW)
            yield write_blocks(pool, sequence, start, tokens, folder, name, watch, durable)

    def wanted(self, tokens: int, files: Iterable[File]) -> list[File]:
        """Those of some files that hold what a sequence has after ``tokens`` tokens.

        Raises
        ------
        SavedDocumentError
            One is missing.
        """
        named = {file.name.partition("-")[0]: file for file in files}
        starts = {STATE: 0} if self._template else {}
        if self._windows is not None:
            starts[WINDOW] = self._windows.first(tokens)
        return [_named(named, kind, start, tokens) for kind, start in starts.items()]

    def shape(self, file: File) -> tuple[int, int]:
        """Rows of a file, and bytes of a row."""
        if file.name.startswith(STATE) or self._windows is None:
            return 1, sum(one.nbytes for one in self._template.values())
        pool = self._windows.pool
        return -(-(file.stop - file.start) // pool.block_tokens), pool.block_bytes

    def rows(self, folder: Folder, file: File, first: int, count: int, watch: Watch) -> Iterator[np.ndarray]:
        """Rows of a file, uint8 [bytes of a row] each, checked.

        Raises
        ------
        SavedDocumentError
            The file is missing or damaged; the message says which and what is wrong.
        """
        is_state = file.name.startswith(STATE) or self._windows is None
        tokens = file.stop if is_state or self._windows is None else self._windows.pool.block_tokens
        return read_rows(folder, file, self.shape(file)[1], tokens, first, count, watch)

    def fill(self, sequence: int, file: File, rows: Iterable[np.ndarray], watch: Watch) -> None:
        """Restore what a file's rows, all of them, hold of a sequence."""
        if file.name.startswith(STATE) or self._windows is None:
            (row,) = rows
            with watch.change():
                self._states.put(sequence, file.stop, self._state(row))
            return
        pool = self._windows.pool
        with watch.change():
            self._windows.put(sequence, file.stop)
            blocks = pool.find(sequence, [(file.start, file.stop)])
        for block, row in zip(blocks, rows, strict=True):
            with watch.change():  # an abandoned read must not write to a block that has a new owner
                pool.fill(block, row)

    def _state(self, row: np.ndarray) -> dict[Any, torch.Tensor]:
        """The state in some bytes, uint8 [n]."""
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


def _named(files: Mapping[str, File], kind: str, start: int, stop: int) -> File:
    file = files.get(kind)
    if file is None or (file.start, file.stop) != (start, stop):
        raise SavedDocumentError(
            f"there is no {kind} of layers after {stop} tokens, without which the model cannot continue: ingest the "
            "document's source again"
        )
    return file
