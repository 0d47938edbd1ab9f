"""Whether it pays to try tokens: how likely they are right, what the rows that they add to a step take, a budget.

A token more is worth what it takes otherwise: its part of a plain step of the batch. A row more costs what was
measured, little for one sequence, whose steps read all weights for one token, and much for many.
"""

from __future__ import annotations

from collections.abc import Sequence

from distkv_dask.worker.speculation.ngrams import LONGEST

PRIOR_TRIALS = 2.0
"""Trials that an expectation counts for before there are any."""
LATELY = 0.9
"""Weight of what was measured before against a new step or trial."""
HASTE = 0.7
"""The same where a plain step took less: what disturbs one makes it longer, and trying would seem to pay."""
FADES = 0.98
"""What remains of trials after a step: what was wrong is tried again some time later."""
MOST_SHARE = 0.02
"""Part of the decode time that speculation may lose."""
CREDIT = 0.5
"""Plain steps that it may lose at first; gains of more are not saved up."""
FRESH = 100
"""Steps after which a plain one is measured again."""
SURPRISE = 4.0
"""How many times as long as expected a step may count: others use the machine, too."""


FIRST_SUMS = [2.0, 9.0, 65.0, 0.4, 2.6]
"""As if two steps had tried 1 and 8 tokens, and added 0.1 and 0.3 of a plain step."""


class Chances:
    """How often what is proposed is right, by how many tokens before it are alike.

    Parameters
    ----------
    others
        What to expect at first: the chances of all sequences.
    """

    def __init__(self, others: Chances | None = None) -> None:
        self._others = others
        self._right = [0.0] * (LONGEST + 1)
        self._tried = [0.0] * (LONGEST + 1)

    def of(self, alike: int) -> float:
        """The chance of a token behind so many that are alike."""
        at = min(alike, LONGEST)
        expected = alike / (alike + 2) if self._others is None else self._others.of(alike)
        return (self._right[at] + PRIOR_TRIALS * expected) / (self._tried[at] + PRIOR_TRIALS)

    def fade(self) -> None:
        """Another step was made."""
        self._right = [FADES * one for one in self._right]
        self._tried = [FADES * one for one in self._tried]

    def learn(self, alike: int, right: bool) -> None:
        """A token behind so many that are alike was tried."""
        at = min(alike, LONGEST)
        self._right[at] = LATELY * self._right[at] + right
        self._tried[at] = LATELY * self._tried[at] + 1
        if self._others is not None:
            self._others.learn(alike, right)


class StepSeconds:
    """What steps of one batch size take: a plain one, and what trying tokens adds, a part for all and one for each."""

    def __init__(self) -> None:
        self.plain = 0.0
        """Seconds of a step that tries nothing; 0 until one is measured."""
        self._age = 0
        self._sums = FIRST_SUMS
        """Of 1, tried, tried², added, tried x added."""

    @property
    def is_known(self) -> bool:
        """Whether a plain step was measured lately."""
        return self.plain > 0 and self._age < FRESH

    def added(self) -> tuple[float, float]:
        """Parts of a plain step that trying adds: whatever is tried, and for each token."""
        n, x, xx, y, xy = self._sums
        each = max(0.0, (n * xy - x * y) / max(1e-9, n * xx - x * x))
        return max(0.0, (y - each * x) / n), each

    def learn(self, seconds: float, tried: int) -> None:
        """A step took so long; what was measured with tokens fades until it is tried again."""
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
    """What speculation may lose, in plain steps: a part of all steps, so that it never costs more than that."""

    def __init__(self) -> None:
        self._credit = CREDIT

    @property
    def allows(self) -> bool:
        """Whether there is something to lose."""
        return self._credit > 0

    def learn(self, steps: float, gained: float) -> None:
        """A step took as long as so many plain ones and brought the tokens of ``gained`` more."""
        self._credit = min(CREDIT, self._credit + MOST_SHARE - (steps - 1 - gained))


def worth_trying(chances: Sequence[Sequence[float]], added: tuple[float, float]) -> list[int]:
    """How many tokens to try of each sequence of a batch; all 0 where that does not pay.

    Parameters
    ----------
    chances
        Of each sequence, how likely each token that is proposed will be taken: all before it, too.
    added
        Parts of a plain step that trying adds: whatever is tried, and for each token.

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
