"""Decides whether speculation pays: acceptance rates, the cost of additional rows in a step, and a budget.

An additional token is worth its share of a plain step of the batch. The cost of an additional row is measured: low for
one sequence, whose steps read all weights for one token, and high for many.
"""

from __future__ import annotations

from collections.abc import Sequence

from distkv_dask.worker.speculation.ngrams import LONGEST

PRIOR_TRIALS = 2.0
"""Weight of the prior expectation, in trials."""
LATELY = 0.9
"""Weight of earlier measurements against a new step or trial."""
HASTE = 0.7
"""The same if a plain step took less time: disturbances only make steps longer, and speculation would seem to pay."""
FADES = 0.98
"""Decay of trials per step: rejected proposals are tried again some time later."""
MOST_SHARE = 0.02
"""Part of the decode time that speculation may cost."""
CREDIT = 0.5
"""Budget in plain steps at first; larger gains are not saved up."""
FRESH = 100
"""Steps after which a plain one is measured again."""
SURPRISE = 4.0
"""Cap of a step's time in multiples of the expected one: others use the machine, too."""


FIRST_SUMS = [2.0, 9.0, 65.0, 0.4, 2.6]
"""Prior: two steps that tried 1 and 8 tokens, and added 0.1 and 0.3 of a plain step."""


class Chances:
    """Acceptance rates by the length of the match.

    Parameters
    ----------
    others
        The prior expectation: the rates of all sequences.
    """

    def __init__(self, others: Chances | None = None) -> None:
        self._others = others
        self._right = [0.0] * (LONGEST + 1)
        self._tried = [0.0] * (LONGEST + 1)

    def of(self, alike: int) -> float:
        """The acceptance rate after a match of this length."""
        at = min(alike, LONGEST)
        expected = alike / (alike + 2) if self._others is None else self._others.of(alike)
        return (self._right[at] + PRIOR_TRIALS * expected) / (self._tried[at] + PRIOR_TRIALS)

    def fade(self) -> None:
        """Record a step."""
        self._right = [FADES * one for one in self._right]
        self._tried = [FADES * one for one in self._tried]

    def learn(self, alike: int, right: bool) -> None:
        """Record a trial after a match of this length."""
        at = min(alike, LONGEST)
        self._right[at] = LATELY * self._right[at] + right
        self._tried[at] = LATELY * self._tried[at] + 1
        if self._others is not None:
            self._others.learn(alike, right)


class StepSeconds:
    """Times of steps of one batch size: plain ones, and the cost of proposals, constant and per token."""

    def __init__(self) -> None:
        self.plain = 0.0
        """Seconds of a step without proposals; 0 until one is measured."""
        self._age = 0
        self._sums = FIRST_SUMS
        """Of 1, tried, tried², added, tried x added."""

    @property
    def is_known(self) -> bool:
        """Whether a plain step was measured recently."""
        return self.plain > 0 and self._age < FRESH

    def added(self) -> tuple[float, float]:
        """Cost of proposals in parts of a plain step: constant, and per token."""
        n, x, xx, y, xy = self._sums
        each = max(0.0, (n * xy - x * y) / max(1e-9, n * xx - x * x))
        return max(0.0, (y - each * x) / n), each

    def learn(self, seconds: float, tried: int) -> None:
        """Record a step's time; measurements with proposals decay until they are repeated."""
        if not tried:
            weight = HASTE if seconds < self.plain else LATELY
            self.plain = weight * self.plain + (1 - weight) * min(seconds, SURPRISE * self.plain) or seconds
            self._age = 0
            self._sums = [FADES * old + (1 - FADES) * first for old, first in zip(self._sums, FIRST_SUMS, strict=True)]
            return
        self._age += 1
        added = min(SURPRISE, seconds / self.plain) - 1
        new = (1.0, tried, tried * tried, added, tried * added)
        self._sums = [LATELY * old + one for old, one in zip(self._sums, new, strict=True)]


class Budget:
    """The budget that speculation may cost, in plain steps: a part of all steps."""

    def __init__(self) -> None:
        self._credit = CREDIT

    @property
    def allows(self) -> bool:
        """Whether the budget is not used up."""
        return self._credit > 0

    def learn(self, steps: float, gained: float) -> None:
        """Record a step's time in plain steps, and the plain steps that its tokens ``gained``."""
        self._credit = min(CREDIT, self._credit + MOST_SHARE - (steps - 1 - gained))


def worth_trying(chances: Sequence[Sequence[float]], added: tuple[float, float]) -> list[int]:
    """Number of tokens to propose for each sequence of a batch; all 0 if that does not pay.

    Parameters
    ----------
    chances
        For each sequence, the probability that each proposed token and all before it are accepted.
    added
        Cost of proposals in parts of a plain step: constant, and per token.

    Examples
    --------
    >>> worth_trying([[0.9, 0.8, 0.1]], (0.1, 0.2))
    [2]
    >>> worth_trying([[0.3], [], []], (0.1, 0.2))
    [0, 0, 0]
    """
    once, each = added
    counts = [sum(chance / len(chances) > each for chance in some) for some in chances]
    gain = sum(sum(some[:count]) for some, count in zip(chances, counts, strict=True)) / max(1, len(chances))
    return counts if gain > once + each * sum(counts) else [0] * len(chances)
