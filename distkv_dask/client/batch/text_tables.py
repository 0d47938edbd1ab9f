"""CSV and JSONL files as records, line by line; an unreadable line is an error of its row alone."""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa

from distkv_dask.client.batch.tables import Record
from distkv_dask.client.files import label_of, open_file
from distkv_dask.errors import SourceError
from distkv_dask.texts import LONGEST_TEXT

CSV = (".csv", ".tsv")
JSONL = (".jsonl", ".ndjson")
COMPRESSED = {"": None, ".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}
"""Ending of a compressed file -> pyarrow's name of the compression."""

_DELIMITERS = ",;\t|"
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_UNREADABLE = (OSError, EOFError, UnicodeError, pa.ArrowException)
_UNDECODABLE = "the row is not UTF-8 text"
_TOO_LONG = f"the row has more than {LONGEST_TEXT:,} characters"


def endings(suffixes: tuple[str, ...]) -> tuple[str, ...]:
    """Return endings of names, also those of compressed files."""
    return tuple(suffix + end for suffix in suffixes for end in COMPRESSED)


def jsonl_records(path: Path) -> Iterator[Record]:
    """Objects of a JSONL file."""
    for line in _lines(path, newline="\n"):
        if line is None:
            yield _TOO_LONG
        elif isinstance(line, Exception):
            yield f"{label_of(path)} cannot be read from here on: {line}"
        elif line.strip("\ufeff \t\r\n"):
            yield _object(line)


def count_lines(path: Path) -> int:
    """Rows of a JSONL file."""
    return sum(1 for line in _lines(path, newline="\n") if not isinstance(line, str) or line.strip("\ufeff \t\r\n"))


def csv_header(path: Path, text_column: str) -> list[str]:
    """The names of a CSV file's columns; none if it is empty.

    Raises
    ------
    SourceError
        When the first line cannot be read.
    """
    return _Csv(path, text_column).header


def csv_records(path: Path, text_column: str) -> Iterator[Record]:
    """Rows of a CSV file with a header; all values are text.

    The delimiter is the one that makes the header name the text column: a comma, semicolon, tab or bar. A quote that
    is not closed is an error of the row in which it opens; the next line is read as a row again.

    Raises
    ------
    SourceError
        When the first line cannot be read.
    """
    return _Csv(path, text_column).records()


class _Csv:
    """A CSV file: opened at once, read as :func:`csv_records` says."""

    def __init__(self, path: Path, text_column: str) -> None:
        csv.field_size_limit(sys.maxsize)  # documents are longer than the module's default of 128 KiB
        self._path = path
        self._lines = _RowLines(path)
        try:
            first = self._first()
            named = re.fullmatch(r"sep=(.)\r?\n?", first)  # Excel writes and reads this line
            if named:
                first = self._first()
            self._delimiter = named.group(1) if named else _delimiter(first, text_column)
            self._lines.again()
            header: list[str] = next(self._reader(), [])
        except (csv.Error, OverflowError, *_UNREADABLE) as error:
            raise SourceError(f"{label_of(path)} has no line of column names that can be read: {error}") from error
        self.header = header
        if not all(map(_decodable, header)):
            raise SourceError(f"{label_of(path)} has column names that are not UTF-8 text: {header!r:.200}")

    def _first(self) -> str:
        """The next line that is not blank."""
        self._lines.begin_row()
        while (line := next(self._lines, "")) and not line.strip():
            self._lines.begin_row()
        return line

    def records(self) -> Iterator[Record]:
        while True:
            self._lines.begin_row()
            try:
                row = next(self._reader(), None)
            except csv.Error as error:
                yield f"the row cannot be read as CSV ({error}): does a quote open that is not closed?"
                self._lines.again(after=1)
            except OverflowError:
                yield _TOO_LONG
                self._lines.again(after=1)
            except _UNREADABLE as error:
                yield f"{label_of(self._path)} cannot be read from here on: {error}"
                return
            else:
                if row is None:
                    return
                if row:  # else a blank line
                    yield self._record(row)

    def _reader(self) -> Any:
        return csv.reader(self._lines, delimiter=self._delimiter, strict=True)

    def _record(self, row: list[str]) -> Record:
        if len(row) != len(self.header):
            return f"the row has {len(row)} values, but the header {len(self.header)} columns"
        return dict(zip(self.header, row, strict=True)) if all(map(_decodable, row)) else _UNDECODABLE


class _RowLines:
    """Lines of a file for a CSV reader; those of the current row can be read again."""

    def __init__(self, path: Path) -> None:
        self._lines = _lines(path, newline="")
        self._again: deque[str] = deque()
        self.begin_row()

    def begin_row(self) -> None:
        """Start a row."""
        self._row: list[str] = []
        self._characters = 0

    def again(self, after: int = 0) -> None:
        """Read the row's lines again, but not the first ``after`` of them."""
        self._again.extendleft(reversed(self._row[after:]))
        self.begin_row()

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._again.popleft() if self._again else next(self._lines)
        if isinstance(line, Exception):
            raise line
        if line is not None:
            self._row.append(line)
            self._characters += len(line)
        if line is None or self._characters > LONGEST_TEXT:
            raise OverflowError(_TOO_LONG)
        return line


def _lines(path: Path, newline: str) -> Iterator[str | Exception | None]:
    """Lines of a text file, None for one that is too long; the last item may be an error."""
    try:
        with _opened(path, newline) as file:
            while line := file.readline(LONGEST_TEXT + 1):
                if len(line) <= LONGEST_TEXT:
                    yield line
                    continue
                while line and not line.endswith(("\n", "\r")):
                    line = file.readline(LONGEST_TEXT)
                yield None
    except _UNREADABLE as error:
        yield error


def _opened(path: Path, newline: str) -> TextIO:
    """Open a file in the encoding that its first bytes show: UTF-8, or UTF-16 or -32 with or without a BOM."""
    raw: Any = open_file(path)
    compression = COMPRESSED.get(path.suffix.lower())
    if compression is not None:
        raw = io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(raw, "r"), compression))
    encoding = json.detect_encoding(raw.peek(4)[:4])
    undecodable = "surrogateescape" if encoding.startswith("utf-8") else "surrogatepass"
    return io.TextIOWrapper(raw, encoding, undecodable, newline)


def _delimiter(header: str, text_column: str) -> str:
    """The delimiter with which a header names the text column; a comma if there is none."""
    for one in _DELIMITERS:
        try:
            if text_column in next(csv.reader([header], delimiter=one)):
                return one
        except (csv.Error, StopIteration):
            continue
    return ","


def _object(line: str) -> Record:
    try:
        if not line.isascii():
            line.encode()
        record = json.loads(line.lstrip("\ufeff"), parse_float=_float, object_pairs_hook=_pairs)
        if _SURROGATE.search(line):
            json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return _UNDECODABLE
    except (ValueError, RecursionError) as error:
        return f"the line is not JSON: {error}"
    return record if isinstance(record, dict) else f"the line is not a JSON object: {record!r:.100}"


def _float(literal: str) -> float:
    """A number within the range of floats."""
    number = float(literal)
    if number in (float("inf"), float("-inf")) or (not number and re.match(r"[-.0]*[1-9]", literal)):
        raise ValueError(f"the number {literal:.50} is beyond a 64-bit float")
    return number


def _pairs(pairs: list[tuple[str, Any]]) -> Mapping[str, Any]:
    """An object with distinct keys."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(name for name, times in Counter(name for name, _ in pairs).items() if times > 1)
        raise ValueError(f"the key {twice!r:.100} occurs twice")
    return found


def _decodable(text: str) -> bool:
    """Whether a text has only whole characters, that is, no half of a surrogate pair."""
    try:
        return text.isascii() or bool(text.encode()) or not text
    except UnicodeEncodeError:
        return False
