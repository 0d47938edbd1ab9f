"""Generated workloads: the paper's nine traces of v2 and eighteen data sets of v1, where they are known.

Published are the ranges of lengths and the shares of long requests. Assumed is all else: the distributions within the
ranges, the lengths of answers, and that requests come all at once unless a rate is given.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from distkv_dask.errors import InvalidRequestError
from distkv_dask.simulate.traces import Arrival


@dataclass(frozen=True, slots=True)
class Workload:
    """A mix of short and long requests.

    Parameters
    ----------
    median, sigma, short
        Prompts of short requests: log-normal around ``median`` tokens, at most ``short``.
    long, share
        A ``share`` of requests is long: log-uniform from ``short`` to ``long`` tokens.
    requests
        How many there are by default.
    """

    median: float
    sigma: float
    short: int
    long: int = 0
    share: float = 0.0
    requests: int = 1000

    def generate(self, requests: int | None = None, rate: float | None = None, seed: int = 0) -> list[Arrival]:
        """Draw requests; with ``rate`` a Poisson process of this many per second, else all come at once."""
        rng = np.random.default_rng(seed)
        count = requests or self.requests
        prompts = np.clip(rng.lognormal(math.log(self.median), self.sigma, count), SHORTEST, self.short)
        if self.share:
            exact = np.zeros(count, bool)  # the share holds in every draw, so that draws can be compared
            exact[: round(count * self.share)] = True
            lengths = np.exp(rng.uniform(math.log(self.short), math.log(self.long), count))
            prompts = np.where(rng.permutation(exact), lengths, prompts)
        outputs = np.clip(rng.lognormal(math.log(ANSWER), 0.8, count), 8, 2000)
        times = np.cumsum(rng.exponential(1 / rate, count)) if rate else np.zeros(count)
        rows = zip(times.tolist(), prompts.tolist(), outputs.tolist(), strict=True)
        return [Arrival(at, int(prompt), int(output)) for at, prompt, output in rows]


SHORTEST = 1_000
ANSWER = 250
"""Median tokens of an answer; with the spread assumed, the mean is 340 (as in ShareGPT)."""

V2 = {f"v2-short-{number}": Workload(6_000, sigma, 60_000) for number, sigma in enumerate((0.5, 1.0, 1.5), 1)} | {
    f"v2-{high}k": Workload(6_000, 1.0, 60_000, high * 1000, 0.1, requests=400)
    for high in (200, 280, 480, 600, 1200, 2000)
}
V1 = {
    f"v1-{high}k-{share}": Workload(2_000, 1.0, 60_000, high * 1000, share / 100, requests=400)
    for high in (200, 600, 2000)
    for share in (1, 5, 10, 15, 20, 30)
}
WORKLOADS = V2 | V1


def workload_named(name: str) -> Workload:
    """A workload by its name.

    Raises
    ------
    InvalidRequestError
        There is none of that name; the message lists them.
    """
    if name not in WORKLOADS:
        raise InvalidRequestError(f"{name} is not a workload; there are {', '.join(WORKLOADS)}.")
    return WORKLOADS[name]
