"""A home's chain of decode windows: which sequences it decodes, which windows are queued, running or done.

Two windows are outstanding at most: one that runs and one that waits at the home lane for the first to end, so
that nothing stands between them; none waits behind one that is going to end all sequences. A sequence joins with the
next window that starts; its holders are added to windows that are queued already. Pure: events in, commands out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

from distkv_dask.scheduler.commands import Abort, AddHolders, Command, Forget, Reset, SubmitWindow
from distkv_dask.types import DecodeWindow, Endpoint, Gang, WindowResult

OUTSTANDING = 2

PATIENCE = 0.2
"""Part of the running window within which the one behind it must be on its way to the home."""

SURE = 0.8
"""Part of a window's expected steps within which sequences are expected to end by themselves."""


@dataclass(slots=True)
class _Outstanding:
    """A window that was submitted and not yet reported done; ``batch`` are the sequences it began with."""

    window: DecodeWindow
    started: bool = False
    batch: frozenset[int] = frozenset()
    waits_since: float | None = None


class WindowChain:
    """Windows of one home of one engine.

    Parameters
    ----------
    home
        The worker.
    new_gang
        Makes a gang from (window number, epoch, holders).
    window_seconds
        Chooses the length of the next window.
    remaining
        How many tokens of a sequence are not committed yet.
    steps
        A window ends after so many steps at the latest; None sets no limit.
    """

    def __init__(
        self,
        home: str,
        new_gang: Callable[[int, int, tuple[Endpoint, ...]], Gang],
        window_seconds: Callable[[], float],
        remaining: Callable[[int], int],
        steps: int | None = None,
    ) -> None:
        self.home = home
        self.epoch = 0
        self.failures = 0
        """How many windows have failed since the last that did not, and since when."""
        self.failing_since = 0.0
        self.rests_until: float | None = None
        """Time before which no window is submitted; whoever sets it pumps when it is over."""
        self.sequences: dict[int, tuple[Endpoint, ...]] = {}
        self.seconds = 0.0
        """Length of the latest window, as planned."""
        self._new_gang = new_gang
        self._window_seconds = window_seconds
        self._remaining = remaining
        self._steps = steps
        self._step_seconds = 0.0
        self._tasks = 0
        self._submitted = 0
        self._outstanding: dict[int, _Outstanding] = {}

    @property
    def tasks(self) -> int:
        """Tasks of a window: the home's and one for each holder."""
        return self._tasks if self.sequences else 0

    def join(self, sequence: int, holders: tuple[Endpoint, ...]) -> Iterator[Command]:
        """A sequence is ready to decode (its state went to the home already)."""
        self.sequences[sequence] = holders
        for number, entry in self._outstanding.items():
            missing = tuple(holder for holder in holders if holder not in entry.window.gang.holders)
            if missing and not entry.started:
                gang = replace(entry.window.gang, holders=entry.window.gang.holders + missing)
                self._outstanding[number] = _Outstanding(replace(entry.window, gang=gang))
                yield AddHolders(gang, missing)
        yield from self.pump()

    def leave(self, sequence: int) -> None:
        """A sequence ended."""
        self.sequences.pop(sequence, None)

    def pump(self) -> Iterator[Command]:
        """Keep one window queued behind the running one while there are sequences."""
        while (
            self.sequences
            and self.rests_until is None
            and len(self._outstanding) < OUTSTANDING
            and all(entry.started and not self._ends_all(entry) for entry in self._outstanding.values())
        ):
            number = self._submitted
            self._submitted += 1
            holders = tuple({endpoint.worker: endpoint for one in self.sequences.values() for endpoint in one}.values())
            self._tasks = 1 + len(holders)
            self.seconds = self._window_seconds()
            window = DecodeWindow(self._new_gang(number, self.epoch, holders), number, self._steps, self.seconds)
            before = list(self._outstanding.values())
            self._outstanding[number] = _Outstanding(window)
            if before:
                yield SubmitWindow(window, before[-1].window.gang, PATIENCE * self._expected(before[-1].window))
            else:
                yield SubmitWindow(window, None)

    def started(self, number: int) -> Iterator[Command]:
        """The home began a window."""
        if number in self._outstanding:
            self._outstanding[number].started = True
            self._outstanding[number].batch = frozenset(self.sequences)
            yield from self.pump()

    def _ends_all(self, running: _Outstanding) -> bool:
        """Whether every sequence is expected to reach its last token in the window that runs.

        Nothing would be left for a window behind it. A wrong guess costs the time of a new one's start.
        """
        if not self._step_seconds:
            return False
        steps = SURE * running.window.seconds / self._step_seconds
        if running.window.steps is not None:
            steps = min(steps, running.window.steps)
        return all(one in running.batch and self._remaining(one) <= steps for one in self.sequences)

    def _expected(self, window: DecodeWindow) -> float:
        """Seconds that a window is expected to last: 0 where only its steps are limited, and none has been timed."""
        if window.steps is None:
            return window.seconds
        return min(window.seconds, window.steps * self._step_seconds)

    def late(self, now: float, limit: float) -> Gang | None:
        """The window that should run and has not been started for ``limit`` seconds, if there is one."""
        first = next(iter(self._outstanding.values()), None)
        if first is None or first.started:
            return None
        if first.waits_since is None:
            first.waits_since = now
        return first.window.gang if now - first.waits_since > limit else None

    def done(self, number: int, used: Iterable[str], result: WindowResult) -> Iterator[Command] | None:
        """The home finished a window in which the holders ``used`` took part; None when it is not ours any more."""
        entry = self._outstanding.pop(number, None)
        if entry is None:
            return None
        self.failures = 0
        if result.steps:
            self._step_seconds = result.seconds / result.steps
        return self._settle(entry.window.gang, frozenset(used))

    def _settle(self, gang: Gang, used: frozenset[str]) -> Iterator[Command]:
        for holder in gang.holders:
            if holder.worker not in used:
                yield Abort(holder.worker, gang.number, "no sequence of the window needed this holder", unused=True)
        yield Forget(gang, finished=True)

    def holders(self) -> Iterator[Endpoint]:
        """The holders of all its sequences and outstanding windows."""
        for holders in (*self.sequences.values(), *(gang.holders for gang in self.gangs())):
            yield from holders

    def gangs(self) -> Iterator[Gang]:
        """The gangs of all outstanding windows."""
        for entry in self._outstanding.values():
            yield entry.window.gang

    def break_(self, reason: str, alive: Callable[[str], bool]) -> Iterator[Command]:
        """End all outstanding windows everywhere; what they did is not committed. Sequences have to join again."""
        for gang in list(self.gangs()):
            for worker in (self.home, *(holder.worker for holder in gang.holders)):
                if alive(worker):
                    yield Abort(worker, gang.number, reason)
            yield Forget(gang, finished=False)
        self._outstanding.clear()
        self.sequences.clear()
        self.epoch += 1
        if alive(self.home):
            yield Reset(self.home, self.epoch)
