"""Counts of a server for Prometheus: calls, tokens, times; no text."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from distkv_dask.completion import Completion

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1800)
"""Borders of the histograms' buckets."""


class Metrics:
    """Figures of one server, in its own registry."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.calls = Counter("distkv_http_requests", "Calls answered", ["path", "status"], registry=self.registry)
        self.open = Gauge("distkv_http_open_requests", "Calls under way", registry=self.registry)
        self.seconds = Histogram(
            "distkv_http_seconds", "Time of a call", ["path"], buckets=SECONDS, registry=self.registry
        )
        self.first = Histogram(
            "distkv_http_first_text_seconds", "Time to the first text of a stream", buckets=SECONDS,
            registry=self.registry,
        )  # fmt: skip
        self.tokens = Counter("distkv_http_tokens", "Tokens of answered calls", ["kind"], registry=self.registry)
        self.cancelled = Counter(
            "distkv_http_cancelled", "Answers cancelled: the client left, or the server stopped", registry=self.registry
        )

    def answered(self, done: Completion) -> None:
        """Count the tokens of an answer."""
        self.tokens.labels("prompt").inc(done.prompt_tokens)
        self.tokens.labels("reused").inc(done.reused_tokens)
        self.tokens.labels("new").inc(sum(len(one.token_ids) for one in done.answers))

    def text(self) -> bytes:
        """All figures, as Prometheus reads them."""
        found: bytes = generate_latest(self.registry)
        return found
