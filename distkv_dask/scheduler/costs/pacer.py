"""The length of decode windows: short if a request or user waits, and long enough for the scheduler to keep up.

Every window costs the Dask scheduler one task for its home and one for each holder. The scheduler may spend a share of
one core on them (``distkv.window.scheduler-share``), so with more homes and holders, windows become longer, and the
scheduler's load stays the same. The cost of a task is measured while it runs. Pure: callers read the clocks.
"""

from __future__ import annotations

from dataclasses import dataclass, field

TASK_SECONDS = 0.003
"""CPU time of the scheduler for one task of a gang, until it is measured."""

CHEAPEST, DEAREST = 0.0005, 0.01
"""Bounds of the measured cost of a task: other work of the scheduler must not stretch windows indefinitely."""

AIM = 0.8
"""Target fraction of the share: the cost of tasks changes faster than it is measured."""

MOST_IDLE = 0.5
"""Maximum part of the budget for heartbeats and the like; a busier scheduler has other users."""

KEPT = 0.7
"""Weight of earlier measurements against a new one."""

PRIOR_TASKS = 50.0
"""Weight of :data:`TASK_SECONDS` at first, in tasks."""

STRANGERS = 0.1
"""Others' tasks, as a part of ours, up to which all of the scheduler's work is attributed to ours."""

LEAST_FOR_DECODE = 0.25
"""Part of the budget reserved for decode windows, however many prompts are computed."""


@dataclass(frozen=True, slots=True)
class Pace:
    """Bounds of a window in seconds, and the part of one core that all windows together may cost the scheduler.

    ``watched`` is its length while its end is awaited: by a user who streams, a request that is about to join the home,
    or one that needs the room of another. ``unwatched`` is its length otherwise; the budget may stretch both up to
    ``longest``.
    """

    watched: float
    unwatched: float
    longest: float
    share: float


@dataclass(slots=True)
class Pacer:
    """The budget of one scheduler, which all engines of its cluster share.

    ``rounds`` has, for each engine, the number of tasks for one window of each of its homes.
    """

    rounds: dict[str, int] = field(default_factory=dict)
    rate: float = 0.0
    """Tasks of gangs per second, lately."""
    prefill_rate: float = 0.0
    """Tasks of prompts among them."""
    load: float = 0.0
    """The scheduler's recent use of one core."""
    idle: float = 0.0
    """Its use without any task."""
    _prefilled: int = 0
    _cpu: float = PRIOR_TASKS * TASK_SECONDS
    _tasks: float = PRIOR_TASKS

    @property
    def task_seconds(self) -> float:
        """CPU time of the scheduler for one task."""
        return min(DEAREST, max(CHEAPEST, self._cpu / self._tasks))

    def window_seconds(self, pace: Pace, watched: bool) -> float:
        """Length of the next window of any home.

        The same lower bound holds for all homes: a round of all their windows, spread over it, costs what the budget
        allows.

        Examples
        --------
        >>> pacer, pace = Pacer(), Pace(watched=0.25, unwatched=1.0, longest=10.0, share=0.375)
        >>> pacer.rounds["engine"] = 10
        >>> pacer.window_seconds(pace, watched=True)
        0.25
        >>> pacer.rounds["engine"] = 200  # 200 tasks of 3 ms
        >>> round(pacer.window_seconds(pace, watched=True), 3)
        2.0
        """
        wish = min(pace.watched, pace.unwatched) if watched else pace.unwatched
        share = AIM * pace.share
        rate = (share - min(self.idle, MOST_IDLE * share)) / self.task_seconds
        rate = max(rate - self.prefill_rate, LEAST_FOR_DECODE * rate)
        return min(max(wish, sum(self.rounds.values()) / rate), max(pace.longest, wish))

    def prefilled(self, tasks: int) -> None:
        """Note that a chunk of a prompt is done; its gang had this many tasks."""
        self._prefilled += tasks

    def measured(self, seconds: float, cpu: float, tasks: int, others: int) -> None:
        """Record the scheduler's work of the last ``seconds``.

        Parameters
        ----------
        cpu
            Its CPU time in seconds.
        tasks, others
            Finished tasks: of gangs, and of other users of the cluster. If there are many of the latter, the
            measurement is not used.
        """
        self.rate += (1 - KEPT) * (tasks / seconds - self.rate)
        self.prefill_rate += (1 - KEPT) * (self._prefilled / seconds - self.prefill_rate)
        self.load += (1 - KEPT) * (cpu / seconds - self.load)
        self._prefilled = 0
        if tasks and others <= STRANGERS * tasks:
            self._cpu = KEPT * self._cpu + max(0.0, cpu - self.idle * seconds)
            self._tasks = KEPT * self._tasks + tasks
        elif not tasks and not others and not any(self.rounds.values()):
            self.idle += (1 - KEPT) * (cpu / seconds - self.idle)
