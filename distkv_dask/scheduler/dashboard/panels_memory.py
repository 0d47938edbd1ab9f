"""Panels about KV memory: pools of workers, and which workers hold how much for others."""

from __future__ import annotations

from bokeh.models import BasicTicker, ColorBar, FactorRange, HoverTool, LinearColorMapper
from bokeh.palettes import Cividis256
from bokeh.plotting import figure
from dask.utils import format_bytes

from distkv_dask.scheduler.dashboard.look import CACHED, DOCUMENTS, FREE, LENT, OWN, TEXT, legend, panel, source
from distkv_dask.scheduler.dashboard.view import View

PARTS = ("own", "lent", "documents", "cached", "free")
OTHERS = ("borrowed", "homes", "role", "copies", "on_disk")


class MemoryPanel:
    """A bar for each worker's pool: blocks of its own sequences, of others', of documents, cached and free ones."""

    name = "memory"

    def __init__(self) -> None:
        self.source = source(self.name, ("label", *PARTS, *OTHERS, "bytes"))
        self.root: figure = panel(
            "KV memory of the workers", y_range=FactorRange(), x_axis_label="blocks", height=300, x_range=(0, 1)
        )
        self.root.hbar_stack(
            list(PARTS),
            y="label",
            height=0.8,
            color=[OWN, LENT, DOCUMENTS, CACHED, FREE],
            fill_alpha=[0.9, 0.9, 0.9, 0.5, 0.35],
            line_color=None,
            source=self.source,
            legend_label=["own sequences", "lent to others", "documents", "cached", "free"],
        )
        self.root.text(
            x=0, y="label", text="bytes", x_offset=4, text_baseline="middle", text_font_size="8pt", source=self.source,
            text_color="black", background_fill_color="white", background_fill_alpha=0.75, padding=2,
        )  # fmt: skip
        self.root.add_tools(
            HoverTool(
                tooltips=[
                    ("worker", "@label (@role)"),
                    ("own", "@own blocks of @homes sequences"),
                    ("lent to others", "@lent blocks"),
                    ("documents", "@documents blocks"),
                    ("cached, and free", "@cached blocks, @copies of them copies of others'"),
                    ("copies on its disk", "@on_disk blocks"),
                    ("borrowed from others", "@borrowed blocks"),
                    ("empty", "@free blocks"),
                ]
            )
        )
        self.root.ygrid.grid_line_color = None
        legend(self.root)

    def update(self, view: View | None) -> None:
        """Show a view; nothing without one."""
        bars = view.workers if view is not None else ()
        size = view.block_bytes if view is not None else 0
        data = {name: [getattr(bar, name) for bar in bars] for name in ("label", *PARTS, *OTHERS)}
        rooms = [sum(getattr(bar, part) for part in PARTS) for bar in bars]
        data["bytes"] = [
            f"{format_bytes((room - bar.cached - bar.free) * size)} of {format_bytes(room * size)}"
            for bar, room in zip(bars, rooms, strict=True)
        ]
        labels = data["label"][::-1]
        if self.root.y_range.factors != labels:
            self.root.y_range.factors = labels
        self.root.x_range.end = max(rooms, default=1) or 1
        self.source.data = data


class DebtPanel:
    """The debt graph as a matrix: blocks that each creditor (column) holds for each debtor (row)."""

    name = "debts"

    def __init__(self) -> None:
        self.source = source(self.name, ("debtor", "creditor", "blocks", "bytes"))
        self.mapper = LinearColorMapper(Cividis256, low=0, high=1)
        self.root: figure = panel(
            "Who holds KV for whom",
            x_range=FactorRange(),
            y_range=FactorRange(),
            x_axis_label="held by (creditor)",
            y_axis_label="home of the sequence (debtor)",
            height=300,
        )
        self.root.rect(
            x="creditor",
            y="debtor",
            width=0.94,
            height=0.94,
            fill_color={"field": "blocks", "transform": self.mapper},
            line_color=None,
            source=self.source,
        )
        bar = ColorBar(color_mapper=self.mapper, ticker=BasicTicker(desired_num_ticks=4), width=10, title="blocks")
        bar.background_fill_color = None
        bar.major_label_text_color = bar.title_text_color = TEXT
        self.root.add_layout(bar, "right")
        self.root.xaxis.major_label_orientation = 0.8
        self.root.add_tools(HoverTool(tooltips=[("", "@creditor holds @blocks blocks (@bytes) for @debtor")]))

    def update(self, view: View | None) -> None:
        """Show a view; nothing without one."""
        debts = view.debts if view is not None else ()
        size = view.block_bytes if view is not None else 0
        creditors = sorted({creditor for _, creditor, _ in debts})
        debtors = sorted({debtor for debtor, _, _ in debts}, reverse=True)
        if self.root.x_range.factors != creditors:
            self.root.x_range.factors = creditors
        if self.root.y_range.factors != debtors:
            self.root.y_range.factors = debtors
        self.mapper.high = max((blocks for _, _, blocks in debts), default=1)
        self.root.title.text = "Who holds KV for whom" + ("" if debts else ": no worker holds any for others now")
        self.source.data = {
            "debtor": [debtor for debtor, _, _ in debts],
            "creditor": [creditor for _, creditor, _ in debts],
            "blocks": [blocks for _, _, blocks in debts],
            "bytes": [format_bytes(blocks * size) for _, _, blocks in debts],
        }
