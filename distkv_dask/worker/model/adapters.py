"""The adapters of one model in this process: read and checked on any thread, computed on the home lane.

The most recently used ones are kept in memory (``distkv.adapters``), as far as weights and KV leave room.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from distkv_dask.adapter import Adapter
from distkv_dask.errors import AdapterError, CapacityError, DistKVError, portable
from distkv_dask.models.adapter_files import adapter_shapes
from distkv_dask.worker.model.lora import AdaptedRows, PlacedAdapter, Run, adapting, placed, watch_linear
from distkv_dask.worker.model.read_adapter import Weights, bytes_of, read_weights

BYTES = 4
"""Bytes of a number of an adapter: float32, as in peft."""
TRIED = 5
"""Tokens of the trial forward of an adapter."""


class Adapters:
    """Adapters of one model.

    Parameters
    ----------
    model
        The transformers model.
    device
        Where the model is.
    """

    def __init__(self, model: Any, device: torch.device) -> None:
        self._model = model
        self._device = device
        self._reading = threading.Lock()
        self._lock = threading.Lock()
        self._read: OrderedDict[str, Weights | DistKVError] = OrderedDict()
        self._kept: OrderedDict[str, PlacedAdapter] = OrderedDict()
        self._paths: dict[str, str] = {}
        self._watched: dict[str, Any] = {}
        self.alike = False
        """Whether a row's bits must not depend on others (``distkv.deterministic``)."""
        self.limit = 1
        """Maximum adapters in memory."""
        self.room = 0
        """Maximum bytes of all of them together."""

    @property
    def nbytes(self) -> int:
        """Bytes of the adapters in memory."""
        with self._lock:
            return self._taken()

    @property
    def paths(self) -> tuple[str, ...]:
        """The folders of the adapters in memory, the most recently used last."""
        with self._lock:
            return tuple(self._paths[one] for one in self._kept)

    def is_prepared(self, adapter: Adapter) -> bool:
        """Whether :meth:`get` does not have to read an adapter first."""
        return adapter.fingerprint in self._kept or adapter.fingerprint in self._read

    def prepare(self, adapter: Adapter) -> None:
        """Read an adapter, on any thread; takes seconds, and raises nothing: :meth:`get` does."""
        with self._reading:
            if self.is_prepared(adapter):
                return
            read = self._weights(adapter)
            with self._lock:
                self._read[adapter.fingerprint] = read
                while len(self._read) > self.limit:  # they were never used
                    self._read.popitem(last=False)

    def _weights(self, adapter: Adapter) -> Weights | DistKVError:
        try:
            self._check_room(adapter)
            return read_weights(adapter, self._model)
        except Exception as error:
            return portable(error, f"reading the adapter in {adapter.path}")

    def get(self, adapter: Adapter, attempt: Callable[[int], object]) -> PlacedAdapter:
        """An adapter, ready to be computed; call it on the home lane.

        Parameters
        ----------
        adapter
            The adapter.
        attempt
            Runs the model over some tokens.

        Raises
        ------
        AdapterError
            It cannot be read, or does not fit the model.
        CapacityError
            There is no memory for it.
        """
        key = adapter.fingerprint
        if (made := self._used(key)) is not None:
            return made
        with self._reading:
            if (made := self._used(key)) is not None:  # another engine on this model has read it in the meantime
                return made
            with self._lock:
                read = self._read.pop(key, None)
            if read is None:
                read = self._weights(adapter)
            if isinstance(read, DistKVError):
                raise read
            self._make_room(bytes_of(read))
            made = placed(read, self._device, self.alike)
            self._try(adapter, made, attempt)
            with self._lock:
                self._kept[key], self._paths[key] = made, adapter.path
        return made

    def _used(self, key: str) -> PlacedAdapter | None:
        """An adapter in memory, noted as used."""
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
            return self._kept.get(key)

    def _check_room(self, adapter: Adapter) -> None:
        """Refuse an adapter that does not fit, before its weights are read."""
        shapes = adapter_shapes(Path(adapter.path)).values()
        nbytes = sum(BYTES * rank * (inner + outer) for inner, rank, outer in shapes)
        if nbytes > self.room:
            raise CapacityError(
                f"the adapter in {adapter.path} needs {nbytes} bytes of memory, but weights and KV leave {self.room} "
                "on this worker: lower kv_memory (distkv.kv-memory), or train an adapter of a lower rank"
            )

    def _make_room(self, nbytes: int) -> None:
        with self._lock:
            while self._kept and (len(self._kept) >= self.limit or self._taken() + nbytes > self.room):
                key, _ = self._kept.popitem(last=False)
                del self._paths[key]
            while self._read and self._taken() + nbytes > self.room:
                self._read.popitem(last=False)

    def _taken(self) -> int:
        """Bytes of the adapters in memory, including those that were only read."""
        read = (bytes_of(one) for one in self._read.values() if not isinstance(one, DistKVError))
        return sum(one.nbytes for one in self._kept.values()) + sum(read)

    def _try(self, adapter: Adapter, made: PlacedAdapter, attempt: Callable[[int], object]) -> None:
        """Compute a few tokens: each of the adapter's linears has to be computed for all of them."""
        for name in made.added:
            if name not in self._watched:
                self._watched[name] = watch_linear(name, self._model.get_submodule(name))
        rows = AdaptedRows((Run(made, 0, TRIED),), TRIED)
        with adapting(rows):
            attempt(TRIED)
        if missing := sorted(made.added.keys() - rows.computed):
            raise AdapterError(
                f"the adapter in {adapter.path} changes {missing[0]} and {len(missing) - 1} others like it, which this "
                "engine does not compute as linear layers: merge it into the model (peft's "
                "merge_and_unload), and open an engine on the result"
            )
