"""Tables: sequences with a bar of their KV's placement, latencies, links, and events."""

from __future__ import annotations

from html import escape
from typing import ClassVar

from bokeh.models import CustomJS, DataTable, HTMLTemplateFormatter, TableColumn

from distkv_dask.scheduler.dashboard.look import source
from distkv_dask.scheduler.dashboard.view import SequenceRow, View
from distkv_dask.svg import PALETTE

MARKUP = "<%= value %>"
"""Template of cells with markup; external text is escaped where the cell is made."""


class _Table:
    """A table whose rows come from a view."""

    name: ClassVar[str]
    columns: ClassVar[dict[str, tuple[str, int]]]
    """Field -> title and width in pixels."""

    markup: ClassVar[frozenset[str]] = frozenset()
    height = 280

    def __init__(self) -> None:
        self.source = source(self.name, self.columns)
        self.root = DataTable(
            source=self.source,
            columns=[
                TableColumn(
                    field=name,
                    title=title,
                    width=width,
                    **({"formatter": HTMLTemplateFormatter(template=MARKUP)} if name in self.markup else {}),
                )
                for name, (title, width) in self.columns.items()
            ],
            index_position=None,
            sizing_mode="stretch_width",
            height=self.height,
            sortable=False,
            selectable=False,
            reorderable=False,
        )
        # Bokeh 3.9 redraws a table only when the number of its rows changes
        redraw = CustomJS(args={"view": self.root.view}, code="view.change.emit()")
        self.source.js_on_change("data", redraw)

    def update(self, view: View | None) -> None:
        """Show a view; nothing without one."""
        rows = self.rows(view) if view is not None else []
        self.source.data = {name: [row[at] for row in rows] for at, name in enumerate(self.columns)}

    def rows(self, view: View) -> list[tuple[str, ...]]:
        """Cells by row, in the order of the columns."""
        raise NotImplementedError


class SequencesPanel(_Table):
    """One row for each of the largest sequences."""

    name = "sequences"
    columns: ClassVar = {
        "number": ("sequence", 60),
        "state": ("state", 60),
        "prompt": ("prompt", 60),
        "generated": ("generated", 65),
        "rate": ("tokens/s", 60),
        "home": ("home", 110),
        "strip": ("where its KV is", 420),
    }
    markup = frozenset({"home", "strip"})
    height = 250

    def rows(self, view: View) -> list[tuple[str, ...]]:
        """Cells by row."""
        colours = {bar.label: PALETTE[at % len(PALETTE)] for at, bar in enumerate(view.workers)}
        rows: list[tuple[str, ...]] = [
            (
                str(row.number),
                row.state,
                f"{row.prompt:,}",
                f"{row.generated:,}",
                f"{row.rate:.1f}" if row.rate else "",
                swatch(row.home, colours) + escape(row.home),
                strip(row, colours),
            )
            for row in view.sequences
        ]
        if view.more_sequences:
            rows.append(("", f"and {view.more_sequences:,} more", "", "", "", "", ""))
        return rows


def swatch(worker: str, colours: dict[str, str]) -> str:
    """A worker's colour as a small square."""
    style = (
        f"display:inline-block;width:10px;height:10px;margin-right:5px;background:{colours.get(worker, PALETTE[-1])}"
    )
    return f'<span style="{style}"></span>'


def strip(row: SequenceRow, colours: dict[str, str]) -> str:
    """A row's KV as coloured pieces in proportion to its tokens, each with its worker and tokens."""
    whole = max(1, row.prompt + row.generated)
    pieces = []
    for worker, tokens in row.strip:
        if tokens:
            size = f"height:14px;width:{100 * tokens / whole:.2f}%"
            style = f"display:inline-block;{size};background:{colours.get(worker, PALETTE[-1])}"
            pieces.append(f'<span title="{escape(worker)}: {tokens:,} tokens" style="{style}"></span>')
    box = "width:100%;height:14px;line-height:0;font-size:0;white-space:nowrap;background:#8883;margin-top:3px"
    return f'<div style="{box}">{"".join(pieces)}</div>'


class LatencyPanel(_Table):
    """Percentiles of latencies."""

    name = "latencies"
    columns: ClassVar = {
        "what": ("time of a request", 150),
        "p50": ("median", 70),
        "p90": ("90th percentile", 90),
        "p99": ("99th percentile", 90),
    }
    height = 140

    def rows(self, view: View) -> list[tuple[str, ...]]:
        """Cells by row."""
        return [
            (what, *(seconds(values[part]) if values else "-" for part in ("p50", "p90", "p99")))
            for what, values in view.latencies.items()
        ]


class LinksPanel(_Table):
    """The slowest measured links, of workers of one host or between hosts."""

    name = "links"
    columns: ClassVar = {
        "one": ("link of", 130),
        "other": ("and", 130),
        "latency": ("one way", 70),
        "bandwidth": ("bandwidth", 80),
    }
    height = 200

    def rows(self, view: View) -> list[tuple[str, ...]]:
        """Cells by row."""
        return [(one.one, one.other, seconds(one.latency), f"{one.bandwidth / 1e9:.2f} GB/s") for one in view.links]


def seconds(value: float) -> str:
    """A time in readable units."""
    if value < 1e-3:
        return f"{value * 1e6:.0f} µs"
    return f"{value:.1f} s" if value >= 1 else f"{value * 1000:.1f} ms"


class EventsPanel(_Table):
    """Recent events, the newest first."""

    name = "events"
    columns: ClassVar = {"when": ("seconds ago", 70), "kind": ("event", 80), "text": ("", 500)}
    height = 200

    def rows(self, view: View) -> list[tuple[str, ...]]:
        """Cells by row."""
        return [(f"{view.time - event.time:,.0f}", event.kind, event.text) for event in reversed(view.events)]
