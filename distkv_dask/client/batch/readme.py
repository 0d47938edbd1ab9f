"""The README of a batch's output: its record in words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


def in_words(parameters: Mapping[str, Any], record: Mapping[str, Any]) -> str:
    """The README of an output.

    Parameters
    ----------
    parameters
        Parameters of the batch.
    record
        See :meth:`Run.record`.
    """
    runs = record["runs"]
    refused = [(one["error"], f"{one['rows']:,}") for one in record["refused"]]
    if record["refused_otherwise"]:
        refused.append(("other errors", f"{record['refused_otherwise']:,}"))
    listed = [
        (run["began"], f"{run['seconds']:,.1f} s", f"{run['rows']:,}", f"{run['errors']:,}", str(run["workers"]),
         run["versions"]["distkv-dask"], run["how"] or "killed, or still running")
        for run in runs
    ]  # fmt: skip
    packages = [(name, number) for name, number in runs[-1]["versions"].items()]
    return "\n\n".join(
        [
            "# Answers of a batch",
            "Written by distkv-dask; `_distkv.json` says the same and more for programs. Read the answers with "
            "`pyarrow.parquet.read_table` of this folder.",
            _table(("", ""), _about(parameters, record)),
            *(["## Rows with errors", _table(("error", "rows"), refused)] if refused else []),
            "## Runs",
            _table(("began", "time", "rows", "errors", "workers", "distkv-dask", "ended"), listed),
            "## Versions of the latest run",
            _table(("package", "version"), packages),
            "",
        ]
    )


def _about(parameters: Mapping[str, Any], record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Questions, model, and the sums of all runs."""
    runs = record["runs"]
    prints = dict.fromkeys(run["fingerprint"] for run in runs)
    questions = [one for one in parameters["questions"] if one is not None]
    said = {name: value for name, value in parameters["sampling"].items() if value is not None}
    return [
        ("Model", f"{parameters['model']} ({parameters['dtype']})"),
        ("Fingerprint of its weights", ", ".join(prints)),
        ("Source", ", ".join(dict.fromkeys(run["source"] for run in runs))),
        ("Questions", "; ".join(questions) or "none: each row is a prompt"),
        ("Sampling", ", ".join(f"{name}={value}" for name, value in said.items())),
        ("Rows", f"{record['rows']:,}, {record['errors']:,} of them with errors"),
        ("Tokens of prompts", f"{record['prompt_tokens']:,}, {record['reused_tokens']:,} of them reused"),
        ("Tokens of answers", f"{record['new_tokens']:,}"),
        ("Wall time", f"{sum(run['seconds'] for run in runs):,.1f} s in {len(runs)} runs"),
    ]


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def _cell(text: str) -> str:
    """A text that stays in its cell."""
    return " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|")
