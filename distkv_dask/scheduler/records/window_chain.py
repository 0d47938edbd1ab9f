"""A home's chain of decode windows: which sequences it decodes, which windows are queued, running or done.

At most two windows are outstanding: one that runs, and one that waits at the home lane, so that there is no gap between
them. None is queued behind a window in which all sequences are going to end.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from distkv_dask.gang import DecodeWindow, Gang
from distkv_dask.placement import Endpoint
from distkv_dask.scheduler.records.request import Request

OUTSTANDING = 2

PATIENCE = 0.2
"""Part of the running window within which the next one must be sent to the home."""

SURE = 0.8
"""Part of a window's expected steps within which sequences are expected to reach their last token."""


@dataclass(slots=True)
class Outstanding:
    """A submitted window that has not been reported done; ``batch`` are the sequences it starts with."""

    window: DecodeWindow
    started: bool = False
    batch: frozenset[int] = frozenset()
    waits_since: float | None = None


@dataclass(slots=True)
class WindowChain:
    """Windows of one home of one engine.

    ``sequences`` has the holders of each sequence that it decodes. ``failures`` counts windows that have failed since
    the last success, ``failing_since`` is when that began; none is submitted before ``rests_until``. ``seconds`` is the
    length of the latest window, as planned, ``step_seconds`` that of the latest step, as measured.
    """

    home: str
    epoch: int = 0
    sequences: dict[int, tuple[Endpoint, ...]] = field(default_factory=dict)
    outstanding: dict[int, Outstanding] = field(default_factory=dict)
    submitted: int = 0
    members: int = 0
    seconds: float = 0.0
    step_seconds: float = 0.0
    failures: int = 0
    failing_since: float = 0.0
    rests_until: float | None = None

    @property
    def tasks(self) -> int:
        """Tasks of a window: the home's and one for each holder."""
        return self.members if self.sequences else 0

    def needs_window(self, requests: Mapping[int, Request]) -> bool:
        """Whether another window should be submitted now for sequences of these requests."""
        return (
            bool(self.sequences)
            and self.rests_until is None
            and len(self.outstanding) < OUTSTANDING
            and all(one.started and not self._ends_all(one, requests) for one in self.outstanding.values())
        )

    def _ends_all(self, running: Outstanding, requests: Mapping[int, Request]) -> bool:
        """Whether every sequence is expected to reach its last token in the running window.

        Then a queued window would have no work. A wrong guess costs the start of a new window.
        """
        if not self.step_seconds:
            return False
        steps = SURE * running.window.seconds / self.step_seconds
        if running.window.steps is not None:
            steps = min(steps, running.window.steps)
        return all(one in running.batch and requests[one].remaining <= steps for one in self.sequences)

    def expected(self, window: DecodeWindow) -> float:
        """Seconds that a window is expected to last: 0 if only its steps are limited, and none has been timed."""
        if window.steps is None:
            return window.seconds
        return min(window.seconds, window.steps * self.step_seconds)

    def late(self, now: float, limit: float) -> Gang | None:
        """The next window if it has not been started for ``limit`` seconds, else None."""
        first = next(iter(self.outstanding.values()), None)
        if first is None or first.started:
            return None
        if first.waits_since is None:
            first.waits_since = now
        return first.window.gang if now - first.waits_since > limit else None

    def holders(self) -> Iterator[Endpoint]:
        """The holders of all its sequences and outstanding windows."""
        for holders in (*self.sequences.values(), *(gang.holders for gang in self.gangs())):
            yield from holders

    def gangs(self) -> Iterator[Gang]:
        """The gangs of all outstanding windows."""
        for entry in self.outstanding.values():
            yield entry.window.gang
