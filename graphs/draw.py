"""Pictures of step graphs, drawn by Dask with graphviz if it is installed, otherwise with cytoscape."""

from __future__ import annotations

import importlib.util
import shutil
from typing import TYPE_CHECKING, Any

from dask import dot

from distkv_dask.errors import MissingProgramError

if TYPE_CHECKING:
    from distkv_dask.graphs.build import StepGraph

COLOURS = ("#cfe2f3", "#fce5cd", "#d9ead3", "#ead1dc", "#fff2cc", "#d9d2e9", "#d0e0e3", "#f4cccc")


def visualize(graph: StepGraph, filename: str | None = "step.svg", **options: Any) -> Any:
    """Draw a graph: a box for each task, with its worker, in the worker's colour.

    Arrows are results that Dask transfers. Dashed ones (with graphviz) are channels, on which members of a gang
    exchange queries and partials of all layers while they run.

    Parameters
    ----------
    graph
        The graph.
    filename
        The file to write (``.svg``, ``.png``, ``.pdf``; ``.html`` with cytoscape); None writes none.
    **options
        For :func:`dask.dot.to_graphviz` or :func:`dask.dot.cytoscape_graph`.

    Returns
    -------
    Any
        What Dask returns for a notebook to display, or None.

    Raises
    ------
    MissingProgramError
        Neither graphviz (the Python package and the program ``dot``) nor ipycytoscape is installed.
    """
    workers = sorted(set(graph.workers.values()), key=list(graph.workers.values()).index)
    colours = {worker: COLOURS[at % len(COLOURS)] for at, worker in enumerate(workers)}
    labels = {key: f"{key.split('@')[0]}\n{worker}" for key, worker in graph.workers.items()}
    common: dict[str, Any] = {"rankdir": "TB", "collapse_outputs": True} | options
    if importlib.util.find_spec("graphviz") is not None and shutil.which("dot") is not None:
        look = {
            key: {"label": labels[key], "shape": "box", "style": "rounded,filled", "fillcolor": colours[worker]}
            for key, worker in graph.workers.items()
        }
        drawing = dot.to_graphviz(graph.tasks, data_attributes=look, function_attributes=look, **common)
        for home, holder in graph.channels:
            drawing.edge(dot.name(home), dot.name(holder), dir="both", style="dashed", label=" channel")
        return dot.graphviz_to_file(drawing, filename, None)
    if importlib.util.find_spec("ipycytoscape") is not None:
        look = {
            key: {"label": labels[key], "shape": "rectangle", "color": colours[worker]}
            for key, worker in graph.workers.items()
        }
        return dot.cytoscape_graph(graph.tasks, filename, data_attributes=look, function_attributes=look, **common)
    raise MissingProgramError(
        "drawing a graph needs graphviz, the Python package and the program: `conda install python-graphviz`, or "
        "`pip install graphviz` and `apt-get install graphviz` (`brew install graphviz`); or `pip install ipycytoscape`"
    )
