"""CSV and JSONL files as records, line by line; what cannot be read is an error of its row alone."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from distkv_dask.errors import SourceError

_UNDECODABLE = "the row is not UTF-8 text"


def csv_records(path: Path) -> Iterator[Mapping[str, Any] | str]:
    """Rows of a CSV file with a header; all values are text."""
    csv.field_size_limit(sys.maxsize)  # documents are longer than the 128 KiB that the module allows by itself
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        rows = csv.reader(file, strict=False)
        header = next(rows, None)
        if not header:
            raise SourceError(f"{path} is empty: a CSV file needs a line of column names first")
        for row in rows:
            if not row:
                continue  # a blank line
            if len(row) != len(header):
                yield f"the row has {len(row)} values, but the header {len(header)} columns"
            elif not all(map(_decodable, row)):
                yield _UNDECODABLE
            else:
                yield dict(zip(header, row, strict=True))


def jsonl_records(path: Path) -> Iterator[Mapping[str, Any] | str]:
    """Objects of a JSONL file."""
    with path.open("rb") as file:
        for line in file:
            if not line.strip():
                continue
            try:
                record = json.loads(line.decode("utf-8-sig"))
            except UnicodeDecodeError:
                yield _UNDECODABLE
            except (ValueError, RecursionError) as error:
                yield f"the line is not JSON: {error}"
            else:
                if not isinstance(record, dict):
                    yield f"the line is not a JSON object: {record!r:.100}"
                elif not all(map(_decodable, record.values())):
                    yield _UNDECODABLE
                else:
                    yield record


def count_lines(path: Path) -> int:
    """Lines of a JSONL file that are not blank."""
    with path.open("rb") as file:
        return sum(1 for line in file if line.strip())


def _decodable(value: Any) -> bool:
    """Whether a text is made of characters; half of a surrogate pair is none."""
    try:
        return not isinstance(value, str) or value.isascii() or bool(value.encode()) or not value
    except UnicodeEncodeError:
        return False
