"""The record of a batch: its model, runs and outcomes, so that its table can be trusted a year later.

It covers all runs, and is stored with the answers: as JSON in the manifest, as text in a README.
"""

from __future__ import annotations

import json
import platform
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

import pyarrow.compute as pc
import pyarrow.parquet as pq

from distkv_dask.client.batch.results import Lot

if TYPE_CHECKING:
    from distkv_dask.client.session.session import Session

PACKAGES = (
    "distkv-dask", "dask", "distributed", "torch", "transformers", "tokenizers", "numpy", "pyarrow", "llguidance",
    "pypdf", "selectolax", "docling",
)  # fmt: skip
"""Packages that answers may depend on; those that are not installed are left out."""

REASONS = 20
"""Number of different errors that a record names; rows with others are counted together."""

TOKENS = ("prompt_tokens", "new_tokens", "reused_tokens", "dropped_tokens")


class Run:
    """One run of a batch, from its beginning.

    Parameters
    ----------
    session
        The engine.
    earlier
        The record of earlier runs, if there is one.
    source
        What the user named as the source.
    """

    def __init__(self, session: Session, earlier: Mapping[str, Any], source: str) -> None:
        self._clock = monotonic()
        self._began = _now()
        self._earlier = list(earlier.get("runs", ()))
        self._facts = {"workers": session.facts.workers, "fingerprint": session.facts.fingerprint}
        self._settings = json.loads(json.dumps(asdict(session.config), default=str))
        self._source = source
        self._counts: Counter[str] = Counter()

    def add(self, lot: Lot) -> None:
        """Count rows that are done."""
        self._counts["rows"] += len(lot.outcomes)
        self._counts["errors"] += len(lot.errors)
        for one in lot.outcomes:
            if one.answer is not None:
                self._counts["prompt_tokens"] += one.answer.prompt_tokens
                self._counts["new_tokens"] += one.answer.new_tokens

    def record(self, parts: Iterable[Path], ended: str | None = None) -> dict[str, Any]:
        """The record of the whole batch.

        Parameters
        ----------
        parts
            The Parquet files of its output.
        ended
            How the run ended; None while it runs. If it stays None, the run was killed.
        """
        figures = {name: self._counts[name] for name in ("rows", "errors", "prompt_tokens", "new_tokens")}
        run = {
            "began": self._began, "ended": None if ended is None else _now(), "how": ended,
            "seconds": round(monotonic() - self._clock, 3), **figures, **self._facts, "source": self._source,
            "versions": versions(),
            "settings": self._settings,
        }  # fmt: skip
        return {**totals(parts), "runs": [*self._earlier, run]}


def totals(parts: Iterable[Path]) -> dict[str, Any]:
    """Rows, errors and tokens of an output's Parquet files, and which errors they are."""
    rows, tokens = 0, Counter(dict.fromkeys(TOKENS, 0))
    reasons, ends = Counter[str](), Counter[str]()
    for part in parts:
        table = pq.read_table(part, columns=["error", "finish_reason", *TOKENS], partitioning=None)
        rows += table.num_rows
        tokens.update({name: pc.sum(table.column(name)).as_py() or 0 for name in TOKENS})
        for column, into in (("error", reasons), ("finish_reason", ends)):
            into.update(one for one in table.column(column).to_pylist() if one is not None)
    named: list[dict[str, Any]] = [{"error": text, "rows": count} for text, count in reasons.most_common(REASONS)]
    others = sum(reasons.values()) - sum(one["rows"] for one in named)
    return {
        "rows": rows, "errors": sum(reasons.values()), **tokens, "finish_reasons": dict(ends), "refused": named,
        "refused_otherwise": others,
    }  # fmt: skip


def versions() -> dict[str, str]:
    """Versions of what runs here."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
