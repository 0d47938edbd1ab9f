"""The outcome of every request: right tokens, a right refusal, or a fault."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from dataclasses import dataclass, field
from typing import Any, Literal

from _chaos.questions import Question
from distkv_dask import CapacityError, Completion, DistKVError, InvalidRequestError
from distkv_dask.client.session.generation import Generation
from distkv_dask.errors import WorkerLostError

Outcome = Literal["completed", "cancelled", "wrong", "failed", "failed_legitimately", "lost", "hung"]
TRIES = 6
"""How often a request that fails legitimately is repeated."""


@dataclass
class Record:
    """One request (or ingesting, saving or loading a document) from its submission to its end."""

    kind: str
    name: str
    began: float
    number: int | None = None
    generation: Generation | None = None
    unwanted: bool = False
    ended: float = 0.0
    outcome: Outcome | None = None
    detail: str = ""

    def words(self) -> dict[str, Any]:
        """For the report."""
        plain = "kind", "name", "number", "outcome", "detail"
        return {one: getattr(self, one) for one in plain} | {
            "began": round(self.began, 2),
            "ended": round(self.ended, 2) or None,
        }


@dataclass
class Records:
    """All requests of a run; used from many threads."""

    began: float = field(default_factory=time.monotonic)
    all: list[Record] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def now(self) -> float:
        """Seconds since the run began."""
        return time.monotonic() - self.began

    def open(self) -> list[Record]:
        """Requests that have not ended."""
        with self._lock:
            return [one for one in self.all if one.outcome is None]

    def count(self) -> Counter[str]:
        """Requests by outcome."""
        return Counter(one.outcome or "open" for one in self.all)

    def begin(self, kind: str, name: str) -> Record:
        """Record a new request."""
        record = Record(kind, name, self.now())
        with self._lock:
            self.all.append(record)
        return record

    def end(self, record: Record, outcome: Outcome, detail: str = "") -> None:
        """Record its end; requests that were counted as hung stay so."""
        with self._lock:
            if record.outcome is None:
                record.outcome, record.detail, record.ended = outcome, detail, self.now()

    def attempts(self, kind: str, name: str) -> Iterator[Record]:
        """A record for each attempt, as long as attempts fail legitimately."""
        for _ in range(TRIES):
            record = self.begin(kind, name)
            yield record
            if record.outcome != "failed_legitimately":
                return

    def run(self, record: Record, work: Callable[[], Any]) -> Any:
        """Run work that has no tokens to compare; returns its result, or None if it failed."""
        try:
            done = work()
        except Exception as error:
            self.failed(record, error)
            return None
        self.end(record, "completed")
        return done

    def compare(self, record: Record, question: Question, wait: Callable[[], Completion]) -> None:
        """Wait for an answer, and check it."""
        try:
            done = wait()
        except (Exception, CancelledError) as error:
            self.failed(record, error)
            return
        if done.token_ids == question.tokens:
            self.end(record, "completed")
            return
        pairs = enumerate(zip(done.token_ids, question.tokens, strict=False))
        same = next((at for at, (ours, right) in pairs if ours != right), "the end of one")
        placed = [(span.worker, span.start, span.stop, span.document) for span in done.placement]
        self.end(
            record,
            "wrong",
            f"differs at token {same} of {len(question.tokens)} after {len(question.prompt)} of prompt; "
            f"{len(done.token_ids)} came, {done.reused_tokens} reused, placement {placed}",
        )

    def refused(self, record: Record, submit: Callable[[], Generation]) -> None:
        """Send a request that no cluster could serve: it must be refused."""
        try:
            submit().result()
        except (CapacityError, InvalidRequestError):
            self.end(record, "completed")
        except Exception as error:
            self.failed(record, error)
        else:
            self.end(record, "wrong", "it was served, although it is too large")

    def failed(self, record: Record, error: BaseException) -> None:
        """Record that a request ended with an error."""
        detail = f"{type(error).__name__}: {error}"
        if isinstance(error, CancelledError):
            self.end(record, "cancelled" if record.unwanted else "failed", "" if record.unwanted else detail)
        elif isinstance(error, WorkerLostError):  # a request fails with its fourth lost worker, a save with its third
            self.end(record, "failed_legitimately", detail)
        else:
            ours = "" if isinstance(error, DistKVError) else "not an error of ours: "
            self.end(record, "failed", ours + detail)
