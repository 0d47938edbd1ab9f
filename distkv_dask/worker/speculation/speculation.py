"""Speculation at a home: proposers of its sequences, and the number of proposals in a step."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import accumulate
from operator import mul

import numpy as np

from distkv_dask.gang import SequenceState
from distkv_dask.worker.speculation.gate import Budget, Chances, StepSeconds, worth_trying
from distkv_dask.worker.speculation.proposer import DocumentIndices, Proposer

MOST = 16
"""Maximum proposals per sequence and step with the setting ``auto``."""


class Speculation:
    """Proposers and rates of a home's sequences over all windows; used on the home lane's thread only.

    Parameters
    ----------
    most
        Maximum proposals per sequence and step; ``"auto"``: :data:`MOST`.
    """

    def __init__(self, most: int | str) -> None:
        self._most = most if isinstance(most, int) else MOST
        self._documents = DocumentIndices()
        self._known: dict[int, tuple[Proposer, Chances]] = {}
        self._chances = Chances()
        self._seconds: defaultdict[int, StepSeconds] = defaultdict(StepSeconds)
        self._budget = Budget()
        self._proposed: dict[int, tuple[Sequence[int], int]] = {}
        self._searched = 0.0

    def begin_window(self, batch: Sequence[SequenceState]) -> Speculation:
        """Start a window with committed states; those without a prompt get no proposals."""
        known, self._known = self._known, {}
        for state in batch:
            if not state.prompt:
                continue
            proposer, chances = known.get(state.sequence) or (self._proposer(state), Chances(self._chances))
            if not np.array_equal(proposer.answer, state.generated):  # the previous window was abandoned
                proposer = self._proposer(state)
            self._known[state.sequence] = proposer, chances
        return self

    def _proposer(self, state: SequenceState) -> Proposer:
        text = np.frombuffer(state.prompt, np.int32)
        shared = [span for span in state.placement if span.document is not None]
        index = None
        if shared and shared[-1].document is not None:
            index = self._documents.of(shared[-1].document, text[: shared[-1].stop])
        made = Proposer(text, index)
        made.add_tokens(state.generated)
        return made

    def propose(self, room: Mapping[int, int]) -> Mapping[int, Sequence[int]]:
        """Proposals for a step by sequence; ``room`` has the maximum number for each."""
        began, self._proposed = time.perf_counter(), {}
        seconds = self._seconds[len(room)]
        once, each = seconds.added()
        if self._budget.allows and seconds.is_known and each * len(room) < 1:
            found = [self._likely(sequence, min(most, self._most)) for sequence, most in room.items()]
            counts = worth_trying([chances for _, _, chances in found], (once, each))
            for sequence, (tokens, alike, _), count in zip(room, found, counts, strict=True):
                if count:
                    self._proposed[sequence] = tokens[:count], alike
        self._searched = time.perf_counter() - began
        return {sequence: tokens for sequence, (tokens, _) in self._proposed.items()}

    def _likely(self, sequence: int, most: int) -> tuple[list[int], int, list[float]]:
        """A sequence's proposals, the length of the match, and the probabilities that all up to each are accepted."""
        if sequence not in self._known:
            return [], 0, []
        proposer, chances = self._known[sequence]
        tokens, alike = proposer.propose(most)
        return tokens, alike, list(accumulate((chances.of(alike + at) for at in range(len(tokens))), mul))

    def learn(self, seconds: float, taken: Mapping[int, Sequence[int]]) -> None:
        """Record the step's time, and the tokens of each sequence."""
        tried = gained = 0
        for sequence, tokens in taken.items():
            if sequence not in self._known:
                continue
            proposer, chances = self._known[sequence]
            proposer.add_tokens(tokens)
            chances.fade()
            drafts, alike = self._proposed.get(sequence, ((), 0))
            for at, draft in enumerate(drafts[: max(1, len(tokens))]):
                chances.learn(alike + at, at < len(tokens) and tokens[at] == draft)
            tried += len(drafts)
            gained += max(0, len(tokens) - 1)
        self._chances.fade()
        known, count = self._seconds[len(taken)], len(taken)
        known.learn(seconds, tried)
        steps = seconds / known.plain if tried else 1.0
        self._budget.learn(steps + self._searched / known.plain, gained / count)
