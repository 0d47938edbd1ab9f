"""Progress of a batch: rows, rate and time left, on a terminal or in a notebook; none if output is piped."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

Advance = Callable[[int, int], None]
"""Called with rows that are done and how many of them have errors."""


@contextmanager
def progress_bar(total: int | None, done: int, errors: int, show: bool | None) -> Iterator[Advance]:
    """Show progress on standard error.

    Parameters
    ----------
    total
        Rows that there will be, None if not known.
    done, errors
        Rows of earlier runs, and how many of them have errors.
    show
        None shows it if standard error is a terminal or a notebook.
    """
    console = Console(stderr=True)
    visible = (console.is_terminal or console.is_jupyter) if show is None else show
    columns = (
        TextColumn("answering"),
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(),
        TimeRemainingColumn(elapsed_when_finished=True),
        TextColumn("{task.fields[errors]} errors"),
    )
    with Progress(*columns, console=console, disable=not visible) as bar:
        task = bar.add_task("", total=total, completed=done, errors=errors)
        failed = errors

        def advance(rows: int, wrong: int) -> None:
            nonlocal failed
            failed += wrong
            bar.update(task, advance=rows, errors=failed)

        yield advance


class _Rate(ProgressColumn):
    """Rows per second or per minute."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        if not speed:
            return Text("-")
        return Text(f"{speed:.1f} rows/s" if speed >= 1 else f"{speed * 60:.1f} rows/min")
