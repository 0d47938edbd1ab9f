"""INT96, the timestamps of older writers: read in microseconds, and refused if that would change them.

INT96 covers eleven million years in nanoseconds. 64 bits cover only a part: nanoseconds until 2262, or microseconds
until the year 294,247. So timestamps are read in three units, and one on which these disagree is an error of its row.
(pyarrow reads INT96's first day, in the year -4713, as 1970 in every unit: a mark of nulls.)
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from distkv_dask.client.files import open_file

_UNITS = ("us", "ns", "ms")

_REFUSED = "holds an INT96 time that microseconds do not hold: nanoseconds, or a year beyond 294,247"


def open_parquet(path: Path, unit: str = "us") -> pq.ParquetFile:
    """Open a Parquet file with INT96 in a unit, without prefetching."""
    open_file(path).close()
    source = pa.OSFile(os.fsencode(path))  # pyarrow accepts names that are not UTF-8 only as bytes
    return pq.ParquetFile(source, pre_buffer=False, buffer_size=1 << 20, coerce_int96_timestamp_unit=unit)


class TimeReader:
    """Reads a file's rows, and finds those with INT96 timestamps that would be changed.

    Parameters
    ----------
    path
        A Parquet file. The reader is a context manager that keeps it open.
    """

    def __init__(self, path: Path) -> None:
        with ExitStack() as opening:
            self._all = [opening.enter_context(open_parquet(path, unit)) for unit in _UNITS]
            self._stack = opening.pop_all()
        self.file = self._all[0]
        leaves = [self.file.schema.column(at) for at in range(len(self.file.schema))]
        self._times = [leaf.path for leaf in leaves if leaf.physical_type == "INT96"]

    def __enter__(self) -> TimeReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def batches(self, columns: Sequence[str], **how: Any) -> Iterator[tuple[pa.RecordBatch, dict[int, str]]]:
        """Read as ``iter_batches`` does; each batch comes with the errors of its rows, by position."""
        times = [path for path in self._times if any(f"{path}.".startswith(f"{name}.") for name in columns)]
        in_units = [file.iter_batches(columns=times, **how) for file in self._all] if times else []
        for batch in self.file.iter_batches(columns=columns, **how):
            yield _checked(batch, [next(one) for one in in_units]) if times else (batch, {})


def _checked(batch: pa.RecordBatch, times: Sequence[pa.RecordBatch]) -> tuple[pa.RecordBatch, dict[int, str]]:
    """Remove values in which a timestamp was changed, by comparing the columns in each unit."""
    wrong: dict[int, str] = {}
    for name in times[0].schema.names:
        bad = _changed(*(_plain(one.column(name)) for one in times))
        if bad:
            kept = pa.array([None if at in bad else at for at in range(batch.num_rows)], pa.int64())
            batch = batch.set_column(batch.schema.get_field_index(name), name, batch.column(name).take(kept))
            wrong |= {at: f"column {name!r} {_REFUSED}" for at in bad}
    return batch, wrong


def _changed(*units: pa.Array) -> frozenset[int]:
    """Positions at which a timestamp was changed, which may be within nested values."""
    if _same(*units):
        return frozenset()
    # taken, not sliced: a slice of lists is cast with all their values
    return frozenset(at for at in range(len(units[0])) if not _same(*(one.take([at]) for one in units)))


def _same(micros: pa.Array, nanos: pa.Array, millis: pa.Array) -> bool:
    """Whether all timestamps keep their precision and are within the range of microseconds."""
    try:
        millis.cast(micros.type)  # fails beyond the range
    except pa.ArrowInvalid:
        return False
    return bool(micros.cast(nanos.type, safe=False).equals(nanos))  # beyond the range of nanoseconds, both wrap alike


def _plain(array: pa.Array) -> pa.Array:
    return array.storage if isinstance(array.type, pa.BaseExtensionType) else array
