"""The page ``/distkv`` on the scheduler's dashboard, and each of its panels as ``/individual-distkv-...``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from bokeh.core.properties import without_property_validation
from bokeh.document import Document
from bokeh.layouts import column, row
from bokeh.models import Div, Select
from distributed.dashboard.components.scheduler import BOKEH_THEME, env
from distributed.dashboard.core import BokehApplication
from distributed.dashboard.scheduler import template_variables

from distkv_dask.messages.names import PLUGIN
from distkv_dask.scheduler.dashboard.look import TEXT
from distkv_dask.scheduler.dashboard.panels_memory import DebtPanel, MemoryPanel
from distkv_dask.scheduler.dashboard.panels_tables import EventsPanel, LatencyPanel, LinksPanel, SequencesPanel
from distkv_dask.scheduler.dashboard.panels_time import AnatomyPanel, RequestsPanel, ThroughputPanel
from distkv_dask.scheduler.dashboard.view import View

if TYPE_CHECKING:
    from distributed.scheduler import Scheduler

    from distkv_dask.scheduler.dashboard.board import Board

PANELS = (
    MemoryPanel, DebtPanel, SequencesPanel, ThroughputPanel, RequestsPanel, AnatomyPanel, LatencyPanel, LinksPanel,
    EventsPanel
)  # fmt: skip
INTERVAL = 500
"""Milliseconds between updates of a page."""

CLOSED = (
    "No engine is open on this cluster. Open one with <code>distkv_dask.Engine(client, model=...)</code>, and this "
    "page fills."
)


class Headline:
    """One line that says what is shown: engine, model, requests; or that there is nothing to show."""

    def __init__(self) -> None:
        self.root = Div(
            name="distkv-headline", sizing_mode="stretch_width", styles={"color": TEXT, "font-size": "14px"}
        )

    def update(self, view: View | None) -> None:
        """Show a view."""
        if view is None:
            self.root.text = CLOSED
            return
        states = ", ".join(f"{number:,} in {state}" for state, number in sorted(view.states.items())) or "no requests"
        done = sum(view.finished.values())
        others = f"; {view.more_workers} more workers are shown together" if view.more_workers else ""
        self.root.text = (
            f"Requests: {states}, {done:,} ended. Placement epoch {view.epoch}, "
            f"blocks of {view.block_tokens} tokens{others}."
        )


class Page:
    """Panels of one browser window, and which engine they show."""

    def __init__(self, board: Board, panels: list[Any], select: Select | None = None, body: Any = None) -> None:
        self._board = board
        self._panels = panels
        self._select = select
        self._body = body
        self._shown: View | None = None
        self._first = True

    @without_property_validation  # type: ignore[untyped-decorator]
    def update(self) -> None:
        """Show the current view."""
        views = self._board.views()
        newest = next(reversed(views), "")
        if self._select is not None:
            options = [(name, f"{view.model} ({name})") for name, view in views.items()]
            if self._select.options != options:
                self._select.options = options
                self._select.visible = len(options) > 1
            if self._select.value not in views:
                self._select.value = newest
            newest = self._select.value
        view = views.get(newest)
        if view is self._shown and not self._first:
            return
        self._shown, self._first = view, False
        if self._body is not None:
            self._body.visible = view is not None
        for panel in self._panels:
            panel.update(view)


def whole_page(scheduler: Scheduler, extra: dict[str, Any], doc: Document) -> None:
    """Document of ``/distkv``."""
    panels = [kind() for kind in PANELS]
    memory, debts, sequences, throughput, requests, anatomy, latencies, links, events = panels
    headline, select = Headline(), Select(title="engine", visible=False, width=320)
    body = column(
        row(memory.root, debts.root, sizing_mode="stretch_width"),
        sequences.root,
        row(throughput.root, requests.root, anatomy.root, sizing_mode="stretch_width"),
        row(latencies.root, links.root, events.root, sizing_mode="stretch_width"),
        sizing_mode="stretch_width",
    )
    page = Page(scheduler.extensions[PLUGIN].dispatcher.board, [headline, *panels], select, body)
    doc.title = "Dask: distkv"
    doc.add_root(column(row(headline.root, select, sizing_mode="stretch_width"), body, sizing_mode="stretch_width"))
    doc.template = env.get_template("simple.html")
    _show_page(page, extra, doc)


def one_panel(kind: Callable[[], Any], scheduler: Scheduler, extra: dict[str, Any], doc: Document) -> None:
    """Document of ``/individual-distkv-...``."""
    panel = kind()
    panel.root.sizing_mode = "stretch_both"
    doc.title = f"Dask: distkv {panel.name}"
    doc.add_root(panel.root)
    _show_page(Page(scheduler.extensions[PLUGIN].dispatcher.board, [panel]), extra, doc)


def _show_page(page: Page, extra: dict[str, Any], doc: Document) -> None:
    doc.template_variables.update(extra)
    doc.theme = BOKEH_THEME
    page.update()
    doc.add_periodic_callback(page.update, INTERVAL)


def add_pages(scheduler: Scheduler, prefix: str) -> None:
    """Serve the pages from a scheduler whose dashboard runs already, and list them in its navigation."""
    plots = {f"/individual-distkv-{kind.name}": partial(one_panel, kind) for kind in PANELS}
    names = template_variables(scheduler)
    bokeh_app = BokehApplication({"/distkv": whole_page, **plots}, scheduler, prefix=prefix, template_variables=names)
    scheduler.http_application.add_application(bokeh_app)
    bokeh_app.initialize(scheduler.loop)
    bokeh_app.start()
    if "distkv" not in names["pages"]:  # Dask's own pages hold these very lists
        names["pages"].append("distkv")
        names["plots"].extend(
            {"url": url.strip("/"), "name": url[len("/individual-") :].replace("-", " ").title()} for url in plots
        )
        names["plots"].sort(key=lambda plot: plot["name"])
