"""Panels about time: throughput, running requests, and the parts of a decode step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from bokeh.models import FactorRange, HoverTool, NumeralTickFormatter
from bokeh.plotting import figure

from distkv_dask.scheduler.dashboard.look import COMPUTE, DECODE, GAP, PREFILL, SENDING, WAITING, legend, panel, source
from distkv_dask.scheduler.dashboard.view import View
from distkv_dask.scheduler.engines.figures import Sample

OVER = 5
"""Samples that a rate is taken over."""


class ThroughputPanel:
    """Tokens a second over the last minutes, those of prompts and those generated."""

    name = "throughput"

    def __init__(self) -> None:
        self.source = source(self.name, ("ago", "prefill", "decode"))
        self.root: figure = panel("Tokens per second", x_axis_label="seconds ago", x_range=(1, 0), y_range=(0, 1))
        for field, colour, text in (("prefill", PREFILL, "prompt"), ("decode", DECODE, "generated")):
            self.root.line("ago", field, source=self.source, color=colour, line_width=2, legend_label=text)
        self.root.yaxis.formatter = NumeralTickFormatter(format="0,0")
        self.root.add_tools(HoverTool(tooltips=[("prompt", "@prefill{0,0}/s"), ("generated", "@decode{0,0.0}/s")]))
        legend(self.root)

    def update(self, view: View | None) -> None:
        """Show a view; nothing without one."""
        data = rates(view.history if view is not None else ())
        fit(self.root, data)
        self.source.data = data


def rates(history: Sequence[Sample]) -> dict[str, list[float]]:
    """Tokens per second at each sample, taken over the :data:`OVER` samples before it, and its age in seconds."""
    now = history[-1].time if history else 0.0
    pairs = list(zip(history, history[OVER:], strict=False))
    return {
        "ago": [now - new.time for _, new in pairs],
        "prefill": [(new.prefilled - old.prefilled) / (new.time - old.time) for old, new in pairs],
        "decode": [(new.generated - old.generated) / (new.time - old.time) for old, new in pairs],
    }


def fit(plot: figure, data: Mapping[str, Sequence[float]]) -> None:
    """Make a plot of columns over their age show all of them, from 0 on."""
    plot.x_range.start = max(data["ago"], default=1) or 1
    plot.y_range.end = (
        1.05 * max((max(column, default=0) for name, column in data.items() if name != "ago"), default=1) or 1
    )


class RequestsPanel:
    """Requests that wait, prefill and decode, over the last minutes."""

    name = "requests"

    def __init__(self) -> None:
        self.source = source(self.name, ("ago", "waiting", "prefill", "decode"))
        self.root: figure = panel("Requests under way", x_axis_label="seconds ago", x_range=(1, 0), y_range=(0, 1))
        for field, colour in (("waiting", WAITING), ("prefill", PREFILL), ("decode", DECODE)):
            self.root.step("ago", field, source=self.source, color=colour, line_width=2, legend_label=field)
        legend(self.root)

    def update(self, view: View | None) -> None:
        """Show a view; nothing without one."""
        history = view.history if view is not None else ()
        now = history[-1].time if history else 0.0
        data: dict[str, list[float]] = {"ago": [now - sample.time for sample in history]}
        for name in ("waiting", "prefill", "decode"):
            data[name] = [getattr(sample, name) for sample in history]
        fit(self.root, data)
        self.source.data = data


STEP = ("compute", "sending", "waiting", "gap")


class AnatomyPanel:
    """Milliseconds of an average decode step of each home: computing, sending, waiting, between windows."""

    name = "step"

    def __init__(self) -> None:
        self.source = source(self.name, ("label", *STEP))
        self.root: figure = panel(
            "A decode step, by home",
            y_range=FactorRange(),
            x_axis_label="milliseconds per step, since the engine opened",
        )
        self.root.hbar_stack(
            list(STEP),
            y="label",
            height=0.8,
            color=[COMPUTE, SENDING, WAITING, GAP],
            line_color=None,
            source=self.source,
            legend_label=["computing", "sending", "waiting", "between windows"],
        )
        self.root.add_tools(
            HoverTool(
                tooltips=[
                    ("home", "@label"),
                    ("computing", "@compute{0.0} ms"),
                    ("sending queries", "@sending{0.00} ms"),
                    ("waiting for partials", "@waiting{0.0} ms"),
                    ("between windows", "@gap{0.00} ms"),
                ]
            )
        )
        self.root.ygrid.grid_line_color = None
        legend(self.root)

    def update(self, view: View | None) -> None:
        """Show a view; nothing without one."""
        rows = view.anatomy if view is not None else ()
        labels = [row.label for row in rows][::-1]
        if self.root.y_range.factors != labels:
            self.root.y_range.factors = labels
        self.root.x_range.end = 1.05 * max((sum(getattr(row, part) for part in STEP) for row in rows), default=1)
        self.source.data = {name: [getattr(row, name) for row in rows] for name in ("label", *STEP)}
