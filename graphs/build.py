"""Step graphs: decode windows and prefill chunks as Dask graphs, pure functions of plans.

A gang is one task per member worker, each pinned to its worker. Chunks of a prompt follow each other by dependencies;
the home lane runs windows of a home one after the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from dask.highlevelgraph import HighLevelGraph, MaterializedLayer

from distkv_dask.gang import DecodeWindow, Gang, PrefillChunk
from distkv_dask.graphs.tasks import attend, decode, prefill
from distkv_dask.placement import Endpoint


@dataclass(frozen=True, slots=True)
class StepGraph:
    """Tasks in Dask's graph format, the worker that each is pinned to, and pairs of tasks that talk over a channel."""

    tasks: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    workers: dict[str, str] = field(default_factory=dict)
    channels: list[tuple[str, str]] = field(default_factory=list)

    def add(self, key: str, worker: str, *task: Any) -> None:
        """Add one pinned task."""
        self.tasks[key] = task
        self.workers[key] = worker

    def visualize(self, filename: str | None = "step.svg", **options: Any) -> Any:
        """Draw the graph; see :func:`distkv_dask.graphs.draw.visualize`."""
        from distkv_dask.graphs.draw import visualize

        return visualize(self, filename, **options)

    def highlevel(self, priority: int = 0, span: Mapping[str, Any] | None = None) -> HighLevelGraph:
        """The graph with its pins as annotations, and the Dask span (``distributed.span``) that its tasks belong to."""
        annotations = {"workers": self.workers.__getitem__, "allow_other_workers": False, "priority": priority}
        layer = MaterializedLayer(self.tasks, annotations=annotations | ({} if span is None else {"span": span}))
        return HighLevelGraph({"distkv": layer}, {"distkv": set()})


def attend_key(gang: Gang, worker: str) -> str:
    """Key of a holder's task in a gang."""
    return f"attend-{gang.name}@{worker}"


def gang_keys(gang: Gang) -> list[str]:
    """Keys of all tasks of a gang, the home's first."""
    return [gang.name, *(attend_key(gang, holder.worker) for holder in gang.holders)]


def window_graph(window: DecodeWindow) -> StepGraph:
    """A decode window: the home's task and one for each holder.

    It does not depend on the window before. Submitted while that one runs, it waits at the home lane, and starts there
    within a fraction of a millisecond. A dependent task would start 4 to 7 ms later.
    """
    graph = StepGraph()
    gang = window.gang
    graph.add(gang.name, gang.home, decode, window)
    for holder in gang.holders:
        graph.add(attend_key(gang, holder.worker), holder.worker, attend, gang)
        graph.channels.append((gang.name, attend_key(gang, holder.worker)))
    return graph


def attend_graph(gang: Gang, holders: Iterable[Endpoint]) -> StepGraph:
    """Tasks of more holders for a window that is already queued."""
    graph = StepGraph()
    for holder in holders:
        graph.add(attend_key(gang, holder.worker), holder.worker, attend, gang)
    return graph


def prefill_graph(chunks: Iterable[PrefillChunk]) -> StepGraph:
    """A prompt's chunks in order, each with the holders of the spans before it."""
    graph = StepGraph()
    after: list[str] = []
    for chunk in chunks:
        gang = chunk.gang
        graph.add(gang.name, gang.home, prefill, chunk, *after)
        for holder in gang.holders:
            graph.add(attend_key(gang, holder.worker), holder.worker, attend, gang, *after)
            graph.channels.append((gang.name, attend_key(gang, holder.worker)))
        after = [gang.name]
    return graph
