"""Opens a batch's source: files by their kind, frames and collections by their library."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa

from distkv_dask.client.batch import frames, parquet, tables, text_tables
from distkv_dask.client.batch.documents import DocumentSource
from distkv_dask.client.batch.openai_format import OpenAIBatchSource, check_spec, is_openai_batch
from distkv_dask.client.batch.rows import Source
from distkv_dask.client.batch.spec import TEXT, BatchSpec
from distkv_dask.client.batch.streams import is_stream, stream_source
from distkv_dask.client.batch.table_folders import table_in
from distkv_dask.client.batch.tables import Columns, Record, TableSource
from distkv_dask.client.batch.text_folders import csv_source, jsonl_source
from distkv_dask.client.documents.readers import DOCUMENTS, Reader
from distkv_dask.client.files import look_into, open_file
from distkv_dask.errors import InvalidRequestError, SourceError
from distkv_dask.filesystems import local_path

if TYPE_CHECKING:
    from distributed import Client

_KINDS = {
    "Parquet": parquet.SUFFIXES,
    "CSV": text_tables.endings(text_tables.CSV),
    "JSONL": text_tables.endings(text_tables.JSONL),
    "documents": DOCUMENTS,
}
"""Kinds of files, by the endings of their names."""


HIDDEN = ".", "~$"
"""Prefixes of names that are not documents: ``~$report.docx`` is the lock of an open document."""


def located(source: Any) -> Any:
    """A source, with a path checked to be on this machine; other sources are returned unchanged.

    Raises
    ------
    SourceError
        When it is elsewhere.
    """
    if not isinstance(source, str | PathLike):
        return source
    path = local_path(source)
    if path is None or "\0" in str(path):
        raise SourceError(
            f"{source!r:.200} is not on this machine, and a batch only reads local files: copy it "
            f"here, mount it, or give what a library reads of it, such as dask.dataframe.read_parquet(...)"
        )
    return path


def source_for(source: Any, spec: BatchSpec, keep: Sequence[str] | None, client: Client | None) -> Source:
    """Open a source for questions; raises as :func:`open_source` and :func:`checked` do."""
    opened = open_source(source, columns_of(spec, keep), client, spec.reader)
    if spec.reader != "auto" and not isinstance(opened, DocumentSource):
        raise InvalidRequestError("reader is for documents, and the source has none: leave it out")
    if isinstance(opened, OpenAIBatchSource):
        check_spec(spec, keep)
        return opened
    if isinstance(opened, DocumentSource):
        _check_documents(spec, keep)
    return checked(opened, spec)


def _check_documents(spec: BatchSpec, keep: Sequence[str] | None) -> None:
    """Refuse parameters about columns, since documents have none."""
    if keep:
        raise InvalidRequestError(f"documents have no columns such as {keep[0]!r}: leave out keep")
    if spec.text_column != TEXT and not spec.uses(spec.text_column):
        raise InvalidRequestError("documents have no columns: leave out text_column")


def columns_of(spec: BatchSpec, keep: Sequence[str] | None) -> Columns:
    """The columns that are used."""
    return Columns(spec.text_column, keep, spec.columns)


def checked(opened: Source, spec: BatchSpec) -> Source:
    """Return a source after checking that it has what the questions need.

    Raises
    ------
    InvalidRequestError
        When the template uses columns that the source does not have, or adapters are in none.
    """
    for name in spec.columns:
        if name not in opened.fields:
            what = f"adapter_column is {name!r}" if name == spec.adapter_column else f"the template uses {{{name}}}"
            raise InvalidRequestError(f"{what}, but the source has only: {', '.join(opened.fields)}")
    return opened


def open_source(source: Any, columns: Columns, client: Client | None, reader: Reader = "auto") -> Source:
    """Open a source.

    Parameters
    ----------
    source
        A path (Parquet, CSV, JSONL, a document, a folder of one kind of them, a Delta table, a saved data set of
        Hugging Face), a pandas or Dask DataFrame, a Dask Bag, a pyarrow table, or a table of another library
        (:mod:`distkv_dask.client.batch.streams`).
    columns
        The columns that are used.
    client
        Computes the partitions of Dask collections; other sources need none.
    reader
        What reads documents.

    Raises
    ------
    SourceError
        When it cannot be read, is not on this machine, or lacks a column.
    MissingProgramError
        When it has PDFs, HTML or a table for which the package that reads them is not installed.
    """
    source = located(source)
    match kind_of(source):
        case "path":
            return _open_path(source, columns, reader)
        case "arrow":
            return TableSource(
                lambda kept: tables.arrow_chunks(source.to_batches(), columns, kept),
                columns,
                source.schema,
                lambda: source.num_rows,
            )
        case "pandas":
            schema = frames.frame_schema(source, columns.text)
            return TableSource(
                lambda kept: frames.frame_chunks(source, columns, kept), columns, schema, lambda: len(source)
            )
        case "dask":
            assert client is not None
            schema = frames.dask_frame_schema(source, columns.text)
            return TableSource(
                lambda kept: frames.dask_frame_chunks(source, columns, kept, client), columns, schema, lambda: None
            )
        case "bag":
            assert client is not None
            schema = frames.bag_schema(source, columns.text, client)
            return TableSource(
                lambda kept: frames.bag_chunks(source, columns, schema, kept, client), columns, schema, lambda: None
            )
        case "stream":
            return stream_source(source, columns)


def kind_of(source: Any) -> Literal["path", "arrow", "pandas", "dask", "bag", "stream"]:
    """The kind of a source, without importing libraries for others; raises SourceError for other objects."""
    if isinstance(source, str | PathLike):
        return "path"
    if isinstance(source, pa.Table):
        return "arrow"
    match type(source).__module__.split(".")[:2], type(source).__name__:
        case ["pandas", *_], "DataFrame":
            return "pandas"
        case ["dask", "dataframe"], "DataFrame":
            return "dask"
        case ["dask", "bag"], "Bag":
            return "bag"
    if is_stream(source):
        return "stream"
    raise SourceError(
        f"a source is a path, a pandas or Dask DataFrame, a Dask Bag, a pyarrow table, or a table that can be read as "
        f"an Arrow stream (polars, DuckDB, datasets, Delta, Iceberg), not {type(source).__name__}"
    )


def records_source(
    records: Callable[[], Iterable[Record]], columns: Columns, schema: pa.Schema, count: Callable[[], int | None]
) -> Source:
    """Records with known types; a text instead of a record is its error."""
    return TableSource(
        lambda kept: tables.record_chunks(records(), columns, kept, schema.names), columns, schema, count
    )


def _open_path(path: Path, columns: Columns, reader: Reader) -> Source:
    if path.is_dir():
        return _open_folder(path, columns, reader)
    try:
        open_file(path).close()
    except FileNotFoundError:
        raise SourceError(f"{path} does not exist") from None
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error}") from error
    kind = next((kind for kind, ends in _KINDS.items() if path.name.lower().endswith(ends)), None)
    if kind is None:
        known = ", ".join(itertools.chain(*_KINDS.values()))
        raise SourceError(f"{path} is not of a kind that can be read: its name should end in one of {known}")
    if kind == "documents":
        return DocumentSource(path, columns.text, reader=reader)
    if kind == "JSONL" and is_openai_batch(path):
        return OpenAIBatchSource(path)
    return _open_table(kind, path, [path], columns)


def _open_folder(path: Path, columns: Columns, reader: Reader) -> Source:
    if (table := table_in(path)) is not None:
        return stream_source(table, columns)
    folder = look_into(path)
    found = {
        kind: folder.ending_in(ends, HIDDEN if kind == "documents" else (".", "_")) for kind, ends in _KINDS.items()
    }
    kinds = [kind for kind, files in found.items() if set(files) - set(folder.unreadable)]
    if len(kinds) > 1:
        raise SourceError(
            f"{path} holds {' and '.join(f'{kind} ({found[kind][0].name}, ...)' for kind in kinds)}: separate them"
        )
    if kinds in ([], ["documents"]):
        return DocumentSource(path, columns.text, found["documents"], reader)
    return _open_table(kinds[0], path, found[kinds[0]], columns)


def _open_table(kind: str, root: Path, paths: list[Path], columns: Columns) -> Source:
    opener = {"Parquet": parquet.parquet_source, "CSV": csv_source, "JSONL": jsonl_source}[kind]
    return opener(root, paths, columns)
