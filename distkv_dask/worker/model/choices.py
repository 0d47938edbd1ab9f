"""Choices as a trie of tokens: which tokens are scored after which, and the likelihoods of the choices.

A choice's log-likelihood is the sum of its tokens' log probabilities. If a choice is the beginning of another one, the
end of the answer counts as part of it: then the choices exclude each other, and their probabilities can be compared.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence

import torch

from distkv_dask.errors import DistKVError, InvalidRequestError
from distkv_dask.gang import Chosen
from distkv_dask.logprobs import TokenLogprob
from distkv_dask.worker.model.sampling import Draw, sample_batch

Tokens = tuple[int, ...]


class ChoiceTrie:
    """The choices of one request.

    Parameters
    ----------
    choices
        Tokens of each; no two are the same.
    ends
        Tokens that end an answer.

    Raises
    ------
    InvalidRequestError
        When a choice is the beginning of another one, and the model has no token that ends an answer.
    """

    def __init__(self, choices: Sequence[Tokens], ends: Collection[int]) -> None:
        self._choices = choices
        self._ends = sorted(ends)
        self._next: dict[Tokens, dict[int, None]] = {}
        for choice in choices:
            for at, token in enumerate(choice):
                self._next.setdefault(choice[:at], {})[token] = None
        for choice in self._next.keys() & {*choices}:
            if not ends:
                raise InvalidRequestError(
                    "a choice is the beginning of another one, and the model has no end-of-sequence token to tell "
                    "where the shorter one ends: choose other words"
                )
            self._next[choice] |= dict.fromkeys(self._ends)
        passed = {node[:at] for node in self._next for at in range(len(node))}
        self.paths = sorted(self._next.keys() - passed - {()})
        """Tokens to compute after the prompt: each path covers the nodes on it."""
        self._found: dict[tuple[Tokens, int], TokenLogprob] = {}

    def targets(self, path: Tokens) -> tuple[Tokens, ...]:
        """The tokens that are scored after each token of a path."""
        return tuple(self.after(path[: at + 1]) for at in range(len(path)))

    def after(self, node: Tokens = ()) -> Tokens:
        """The tokens that are scored after some tokens, or after the prompt."""
        return tuple(self._next[node])

    def learn(self, path: Tokens, scored: Iterable[TokenLogprob]) -> None:
        """Add the log probabilities of a path's targets, or of those after the prompt."""
        nodes = [path[: at + 1] for at in range(len(path))] or [()]
        keys = ((node, token) for node in nodes for token in self.after(node))
        self._found.update(zip(keys, scored, strict=True))

    def choose(self, draw: Draw) -> Chosen:
        """The choice that is drawn, most likely the best, once everything is known.

        Raises
        ------
        DistKVError
            None can be drawn.
        """
        likelihoods = torch.tensor([[self._likelihood(choice) for choice in self._choices]], dtype=torch.float64)
        (found,) = sample_batch(likelihoods, [draw])
        if isinstance(found, DistKVError):
            raise found
        tokens, best = self._choices[found], draw.params.logprobs
        logprobs: tuple[TokenLogprob, ...] = ()
        if best is not None:
            some = (self._found[tokens[:at], token] for at, token in enumerate(tokens))
            logprobs = tuple(one._replace(best=one.best[:best]) for one in some)
        return Chosen(tokens, logprobs, tuple(likelihoods.softmax(-1)[0].tolist()))

    def _likelihood(self, choice: Tokens) -> float:
        whole = math.fsum(self._found[choice[:at], token].logprob for at, token in enumerate(choice))
        if choice not in self._next:
            return whole
        ends = torch.tensor([self._found[choice, end].logprob for end in self._ends], dtype=torch.float64)
        return whole + float(ends.logsumexp(0))
