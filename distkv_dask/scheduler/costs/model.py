"""The performance model (paper v2): the time of a step on a worker, and an instance's throughput. Pure.

``T_layer = W(b) / f(b) + sum_r S_r / g(S)`` plus communication, here for all layers at once: the non-attention part is
a straight line in the batch, attention is a straight line in the tokens that are read.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import combinations

import numpy as np

from distkv_dask.placement import Endpoint


@dataclass(frozen=True, slots=True)
class Curve:
    """Seconds that one worker needs, all layers together.

    Parameters
    ----------
    step
        One decode step without any sequence: reading the weights, launching kernels.
    row
        More, for each sequence of the batch: ``W(b) / f(b)`` is ``step + b * row``.
    token
        Attention of one decoding sequence over one token of KV: ``1 / g``.
    prompt
        Prefill of one token, without attention.
    pair
        Prefill attention of one query over one token of KV.
    """

    step: float
    row: float
    token: float
    prompt: float
    pair: float

    def decode(self, batch: float, tokens: float) -> float:
        """One decode step of ``batch`` sequences whose KV on the worker is ``tokens`` tokens."""
        return self.step + batch * self.row + tokens * self.token if batch else 0.0

    def prefill(self, tokens: float, before: float = 0.0) -> float:
        """A prompt's next ``tokens`` tokens, with ``before`` tokens of KV on the worker that they attend to as well."""
        return tokens * self.prompt + tokens * (before + tokens / 2) * self.pair


def fit_decode(samples: Iterable[tuple[int, float, float]]) -> tuple[float, float, float]:
    """Least squares fit of (batch, tokens, seconds) samples of decode steps: ``step``, ``row`` and ``token``.

    Relative errors are minimised, since short steps matter as much as long ones; none of the three is negative.

    Raises
    ------
    ValueError
        With fewer than three samples, or samples that all have the same batch or the same number of tokens.
    """
    measured = np.array(list(samples), dtype=float).reshape(-1, 3)
    features = np.column_stack([np.ones(len(measured)), measured[:, :2]]) / measured[:, 2:]
    if np.linalg.matrix_rank(features * measured[:, 2:]) < 3:
        raise ValueError("the samples need at least two batch sizes and two numbers of tokens that vary independently")
    target, best = np.ones(len(measured)), (math.inf, np.zeros(3))
    for kept in (list(some) for size in (1, 2, 3) for some in combinations(range(3), size)):  # NNLS: one of these is it
        found = np.zeros(3)
        found[kept] = np.linalg.lstsq(features[:, kept], target, rcond=None)[0]
        error = float(np.linalg.norm(features @ found - target))
        if (found >= 0).all() and error < best[0]:
            best = error, found
    step, row, token = best[1].tolist()
    return step, row, token


@dataclass(frozen=True, slots=True)
class Link:
    """A connection between two workers: one-way latency in seconds, bytes per second."""

    latency: float
    bandwidth: float

    def seconds(self, size: float) -> float:
        """One way for ``size`` bytes."""
        return self.latency + size / self.bandwidth


Pair = tuple[str, str]
"""Two workers, or two hosts, in alphabetical order."""


def pair(one: str, other: str) -> Pair:
    """Two names in the order in which links are known."""
    return (one, other) if one <= other else (other, one)


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a model: layers, and bytes per token of KV (all layers), of a query and of a partial (one layer)."""

    layers: int
    kv_bytes: int
    query_bytes: int
    partial_bytes: int


@dataclass(frozen=True, slots=True)
class PerformanceModel:
    """Costs of one model on one cluster.

    Parameters
    ----------
    shape
        The model's sizes.
    curve
        The curve of workers that ``curves`` does not name.
    inside, between
        Links of two workers on one host, and on two hosts, where ``links`` has neither.
    links
        By pair of workers or hosts, where they were measured.
    curves
        By worker, where workers differ. Their owner may change them
        (:mod:`~distkv_dask.scheduler.costs.calibration`).
    """

    shape: Shape
    curve: Curve
    inside: Link
    between: Link
    curves: Mapping[str, Curve] = field(default_factory=dict)
    links: Mapping[Pair, Link] = field(default_factory=dict)

    def of(self, worker: str) -> Curve:
        """A worker's curve."""
        return self.curves.get(worker, self.curve)

    def link(self, one: Endpoint, other: Endpoint) -> Link:
        """The link of two workers: theirs, their hosts', or the usual one."""
        usual = self.inside if one.host == other.host else self.between
        if not self.links:
            return usual
        found = self.links.get(pair(one.worker, other.worker)) or self.links.get(pair(one.host, other.host))
        return found or usual

    def exchange(self, link: Link, rows: float) -> float:
        """Queries of ``rows`` tokens to a holder and partials back, in every layer."""
        shape = self.shape
        return shape.layers * (2 * link.latency + rows * (shape.query_bytes + shape.partial_bytes) / link.bandwidth)

    def step(
        self,
        home: str,
        batch: float,
        tokens: float,
        remote: Mapping[str, tuple[float, float]],
        links: Mapping[str, Link] | None = None,
    ) -> float:
        """A decode step of ``batch`` sequences (on average) of a home with ``tokens`` tokens of their KV.

        ``remote`` has, for each holder, its sequences and its tokens; ``links`` the holder's link with the home, by
        default that inside a host. Holders and home attend at the same time; queries are sent and partials received one
        after the other.
        """
        attention = max((count * self.of(holder).token for holder, (_, count) in remote.items()), default=0.0)
        known = links or {}
        exchanges = sum(self.exchange(known.get(holder, self.inside), rows) for holder, (rows, _) in remote.items())
        curve = self.of(home)
        return curve.decode(batch, 0) + max(tokens * curve.token, attention) + exchanges

    def transfer(self, link: Link, tokens: int) -> float:
        """Moving the KV of ``tokens`` tokens."""
        return link.seconds(tokens * self.shape.kv_bytes)
