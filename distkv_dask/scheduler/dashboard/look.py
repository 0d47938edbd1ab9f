"""Style of the panels: colours that colour-blind people can distinguish, text readable on light and dark."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from bokeh.models import ColumnDataSource
from bokeh.plotting import figure

OWN, LENT, DOCUMENTS, CACHED, FREE = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#BDBDBD"
COMPUTE, SENDING, WAITING, GAP = "#0072B2", "#56B4E9", "#E69F00", "#999999"
PREFILL, DECODE = "#D55E00", "#0072B2"

TEXT = "#767676"
"""A grey with a contrast of 4.5 to 1 on white and on black alike."""


def panel(title: str, **settings: Any) -> figure:
    """An empty figure in the panels' style."""
    options = {"height": 280, "min_width": 320, "tools": "", "sizing_mode": "stretch_width", "title": title} | settings
    made = figure(**options)
    made.toolbar.logo = None
    made.toolbar_location = None
    made.title.text_color = TEXT
    made.background_fill_color = made.border_fill_color = None
    made.outline_line_color = None
    made.grid.grid_line_color = TEXT
    made.grid.grid_line_alpha = 0.2
    for axis in made.axis:
        axis.axis_label_text_color = axis.major_label_text_color = TEXT
        axis.axis_line_color = axis.major_tick_line_color = TEXT
        axis.minor_tick_line_color = None
    return made


def source(panel: str, columns: Iterable[str]) -> ColumnDataSource:
    """A panel's data, empty; it is found in a document by the name ``distkv-`` and the panel's."""
    return ColumnDataSource({column: [] for column in columns}, name=f"distkv-{panel}")


def legend(made: figure, **settings: Any) -> None:
    """Put the legend of a panel above it, in a row."""
    for one in made.legend:
        one.orientation = "horizontal"
        one.label_text_color = TEXT
        one.background_fill_alpha = 0
        one.border_line_color = None
        one.margin = one.padding = 0
        one.glyph_height = one.glyph_width = 14
        one.update(**settings)
        made.add_layout(one, "above")
