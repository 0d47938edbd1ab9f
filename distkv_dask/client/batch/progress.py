"""Progress of a batch: rows, rate and time left, on a terminal or in a notebook; none if output is piped."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

Advance = Callable[[int, int, float | None], None]
"""Called with rows that are done, how many of them have errors, and the seconds left (None if unknown)."""


@contextmanager
def progress_bar(total: int | None, done: int, errors: int, show: bool | None) -> Iterator[Advance | None]:
    """Show progress on standard error; yields None if nothing is shown.

    Parameters
    ----------
    total
        Number of rows; None if not known.
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
        _Left(),
        TextColumn("{task.fields[errors]} errors"),
    )
    if not visible:
        yield None
        return
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("", total=total, completed=done, errors=errors, left=None)
        failed = errors

        def advance(rows: int, wrong: int, left: float | None) -> None:
            nonlocal failed
            failed += wrong
            bar.update(task, advance=rows, errors=failed, left=left)

        yield advance


class _Rate(ProgressColumn):
    """Rows per second or per minute."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        if not speed:
            return Text("-")
        return Text(f"{speed:.1f} rows/s" if speed >= 1 else f"{speed * 60:.1f} rows/min")


class _Left(ProgressColumn):
    """The time left, by tokens; at the end, the time that it took."""

    def render(self, task: Task) -> Text:
        seconds = task.finished_time if task.finished else task.fields["left"]
        return Text("-:--:--" if seconds is None else str(timedelta(seconds=round(seconds))))
