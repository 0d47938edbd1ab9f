"""Answers that are one of several choices: scored after the prompt's last chunk, without a decode step.

The KV of a path of the trie is stored after the prompt's, past the committed length; the next path overwrites it, as a
repeated window would.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace

from distkv_dask.gang import ChunkResult, PrefillChunk
from distkv_dask.logprobs import TokenLogprob
from distkv_dask.worker.model.choices import ChoiceTrie, Tokens
from distkv_dask.worker.model.sampling import Draw

ROWS = 128
"""Maximum tokens of paths in one forward, unless a single path is longer: each token has its own logits."""


class Choosing:
    """Scores the choices of one request.

    Parameters
    ----------
    chunk
        The last one of the prompt.
    ends
        Tokens that end an answer.

    Raises
    ------
    InvalidRequestError
        When the choices cannot be distinguished.
    """

    def __init__(self, chunk: PrefillChunk, ends: Collection[int]) -> None:
        assert chunk.sampling is not None
        self._sampling = chunk.sampling
        self._trie = ChoiceTrie(chunk.choices, ends)
        self._prompt = len(chunk.targets)
        without = ((),) * (len(chunk.tokens) - 1 - self._prompt)
        self._best = chunk.best
        self.chunk = replace(
            chunk,
            targets=(*chunk.targets, *without, self._trie.after()),
            best=max(chunk.best, chunk.sampling.logprobs or 0),
        )
        """The chunk, with the tokens that are scored after it."""
        self._scored: tuple[TokenLogprob, ...] = ()

    def take_prompt_scores(self, scored: Sequence[TokenLogprob]) -> None:
        """Add the scores in the chunk and right after it."""
        self._scored = tuple(one._replace(best=one.best[: self._best]) for one in scored[: self._prompt])
        self._trie.learn((), scored[self._prompt :])

    def paths(self) -> Iterator[PrefillChunk]:
        """The paths to compute after the chunk."""
        for path in self._trie.paths:
            yield replace(
                self.chunk, start=self.chunk.stop, tokens=path, sampling=None, targets=self._trie.targets(path)
            )

    def learn(self, path: Tokens, scored: Sequence[TokenLogprob]) -> None:
        """Add the scores on a path."""
        self._trie.learn(path, scored)

    def result(self) -> ChunkResult:
        """The result of the chunk; raises a DistKVError if none of the choices can be drawn."""
        chosen = self._trie.choose(Draw(self._sampling, self.chunk.stop))
        return ChunkResult(scored=self._scored, chosen=chosen)


def rounds(some: Sequence[Choosing]) -> Iterator[list[tuple[Choosing, PrefillChunk]]]:
    """Paths that are computed together: one of each request at most, and not too many tokens."""
    waiting = [list(one.paths()) for one in some]
    while any(waiting):
        batch: list[tuple[Choosing, PrefillChunk]] = []
        room = ROWS
        for one, paths in zip(some, waiting, strict=True):
            if paths and (not batch or len(paths[0].tokens) <= room):
                batch.append((one, paths.pop(0)))
                room -= len(batch[-1][1].tokens)
        yield batch
