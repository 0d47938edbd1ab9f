"""A program that measures how much memory a model's weights take in one process, and in two.

Its arguments are a folder and dtypes. It prints a JSON object with ``[bytes in one, bytes in both, bytes of own
copies]`` for each dtype. For ``packed``, in the checkpoint's dtype, the last number has the bytes of weights that are
not packed, after a forward of more tokens than the core serves at once. Both processes fork from this one, because
imports take seconds.
"""

from __future__ import annotations

import json
import multiprocessing
import re
import sys
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from distkv_dask.kernels import few_rows
from distkv_dask.worker.model import host_files
from distkv_dask.worker.model.host_copy import own_bytes
from distkv_dask.worker.model.load import load_model
from distkv_dask.worker.model.loaded import LoadedModel
from distkv_dask.worker.model.no_attention import NoAttention
from distkv_dask.worker.model.packed import Choice, FewRowsLinear


def pss(weights: list[torch.Tensor]) -> int:
    """Bytes of memory with weights as reported by the kernel (PSS): shared pages are divided among processes."""
    found, holds = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if head := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            start, stop = (int(one, 16) for one in head.groups())
            holds = any(start <= weight.data_ptr() < stop for weight in weights)
        elif holds and line.startswith("Pss:"):
            found += 1024 * int(line.split()[1])
    return found


def packed_in(model: LoadedModel) -> list[torch.Tensor]:
    """The packed weights of a model."""
    forwards = (vars(module).get("forward") for module in model._model.modules())
    return [one.few._kept[0] for one in forwards if isinstance(one, FewRowsLinear)]


def serve(pipe: Connection) -> None:
    """Load a model on command, and measure."""
    models: list[LoadedModel] = []
    choice = Choice(((8, few_rows.MODEL),), alone=8)
    while command := pipe.recv():
        match command:
            case ["load", folder, "packed"]:
                models = [load_model(folder, "auto", 1)]
                models[0].pack(0, 8, lambda: choice)
                ids = torch.arange(9)
                models[0].forward(ids, ids, NoAttention(models[0].geometry.value_dim), torch.tensor([0]))
            case ["load", folder, dtype]:
                models = [load_model(folder, dtype, 1)]
                with torch.inference_mode():
                    for weight in models[0]._model.parameters():
                        weight.view(torch.uint8).sum()  # maps its pages
        model, packed = models[0]._model, packed_in(models[0])
        plain = pss(list(model.parameters()))
        pipe.send((plain + pss(packed), plain if packed else own_bytes(model)))


def main(folder: str, dtypes: list[str]) -> None:
    """Measure each dtype."""
    host_files.FREE = 0.0  # however full this machine's disk is
    fork = multiprocessing.get_context("fork")
    pipes = []
    for _ in range(2):
        here, there = fork.Pipe()
        fork.Process(target=serve, args=[there], daemon=True).start()
        pipes.append(here)

    def ask(at: int, *command: str) -> tuple[int, int]:
        pipes[at].send(command)
        return pipes[at].recv()

    said = {}
    for dtype in dtypes:
        alone, _ = ask(0, "load", folder, dtype)
        _, own = ask(1, "load", folder, dtype)
        said[dtype] = alone, ask(0, "measure")[0] + ask(1, "measure")[0], own
    print(json.dumps(said))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
