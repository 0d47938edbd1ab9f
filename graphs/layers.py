"""The same steps as explicit graphs: one task per layer at the home, one per layer and holder for attention.

Queries and partials are the tasks' results, so Dask transfers them. A window is one step long: the graph of a window is
the graph of a step. Everything is visible, but slow; engines use :mod:`distkv_dask.graphs.build` by default.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from dask._task_spec import Alias

from distkv_dask.gang import DecodeWindow, Gang, PrefillChunk
from distkv_dask.graphs.build import StepGraph
from distkv_dask.graphs.tasks import attend_layer, begin_forward, finish, layer


def layer_key(gang: Gang, at: int) -> str:
    """Key of the home's task of a layer."""
    return f"layer-{gang.name}-{at}"


def attend_layer_key(gang: Gang, at: int, worker: str) -> str:
    """Key of a holder's task of a layer."""
    return f"attend-{gang.name}-{at}@{worker}"


def layer_window_graph(window: DecodeWindow, layers: int, after: Gang | None = None) -> StepGraph:
    """One decode step, after the window ``after``; its last task has the gang's name, and commits it."""
    graph = StepGraph()
    _add(graph, replace(window, steps=1), layers, after)
    return graph


def layer_prefill_graph(chunks: Iterable[PrefillChunk], layers: int) -> StepGraph:
    """A prompt's chunks in order."""
    graph = StepGraph()
    after: Gang | None = None
    for chunk in chunks:
        _add(graph, chunk, layers, after)
        after = chunk.gang
    return graph


def _add(graph: StepGraph, work: DecodeWindow | PrefillChunk, layers: int, after: Gang | None) -> None:
    gang = work.gang
    # an Alias, because Dask reads a string as a key only if the key is in the same graph
    graph.add(layer_key(gang, 0), gang.home, begin_forward, work, *([Alias(after.name)] if after else []))
    for at in range(layers):
        asked, answers = layer_key(gang, at), []
        for holder in gang.holders:
            answers.append(attend_layer_key(gang, at, holder.worker))
            graph.add(answers[-1], holder.worker, attend_layer, gang, asked)
        if at + 1 < layers:
            graph.add(layer_key(gang, at + 1), gang.home, layer, gang, at + 1, asked, *answers)
        else:
            graph.add(gang.name, gang.home, finish, gang, layers, asked, *answers)
