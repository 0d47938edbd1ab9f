"""What a user names as a batch's source, opened: files by what they are, frames and collections by their library."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa
import pyarrow.dataset as ds

from distkv_dask.client.batch import frames, tables, text_tables
from distkv_dask.client.batch.documents import DocumentSource, files_in
from distkv_dask.client.batch.extract import EXTRACTORS
from distkv_dask.client.batch.openai_format import OpenAIBatchSource, is_openai_batch
from distkv_dask.client.batch.rows import Source
from distkv_dask.client.batch.spec import BatchSpec
from distkv_dask.client.batch.tables import Columns, TableSource
from distkv_dask.errors import InvalidRequestError, SourceError

if TYPE_CHECKING:
    from distributed import Client

_PARQUET = (".parquet", ".pq")
_JSONL = (".jsonl", ".ndjson")


def source_for(source: Any, spec: BatchSpec, keep: Sequence[str] | None, client: Client) -> Source:
    """Open a source of which questions are asked; raises as :func:`open_source` and :func:`checked` do."""
    return checked(open_source(source, columns_of(spec, keep), client), spec)


def columns_of(spec: BatchSpec, keep: Sequence[str] | None) -> Columns:
    """Which columns are looked at."""
    return Columns(spec.text_column, keep, spec.columns)


def checked(opened: Source, spec: BatchSpec) -> Source:
    """Return a source of which may be asked what is asked.

    Raises
    ------
    InvalidRequestError
        When the template uses columns that the source has not, or its rows are whole prompts already.
    """
    if isinstance(opened, OpenAIBatchSource):
        if spec.questions != (None,) or spec.template is not None:
            raise InvalidRequestError("an OpenAI batch file has its own prompts: leave out question and template")
        return opened
    for name in spec.columns:
        if name not in opened.fields:
            raise InvalidRequestError(
                f"the template uses {{{name}}}, but the source has only: {', '.join(opened.fields)}"
            )
    return opened


def open_source(source: Any, columns: Columns, client: Client) -> Source:
    """Open a source.

    Parameters
    ----------
    source
        A path (Parquet file or folder, CSV, JSONL, a document or a folder of them), a pandas or Dask DataFrame, a Dask
        Bag, or a pyarrow table.
    columns
        Which columns are looked at.
    client
        Computes the partitions of Dask collections.

    Raises
    ------
    SourceError
        When it cannot be read, or lacks a column.
    MissingProgramError
        When it holds PDFs and pypdf is not installed.
    """
    match kind_of(source):
        case "path":
            return _open_path(Path(source), columns)
        case "arrow":
            return TableSource(_arrow(source.to_batches, columns), columns, source.schema, lambda: source.num_rows)
        case "pandas":
            schema = frames.frame_schema(source, columns.text)
            return TableSource(
                lambda: frames.frame_chunks(source, columns, schema), columns, schema, lambda: len(source)
            )
        case "dask":
            schema = frames.frame_schema(source._meta_nonempty, columns.text)
            return TableSource(
                lambda: frames.dask_frame_chunks(source, columns, schema, client), columns, schema, lambda: None
            )
        case "bag":
            schema = frames.bag_schema(source, columns.text, client)
            return TableSource(
                lambda: frames.bag_chunks(source, columns, schema, client), columns, schema, lambda: None
            )


def kind_of(source: Any) -> Literal["path", "arrow", "pandas", "dask", "bag"]:
    """What a source is, without importing what it may not be; raises SourceError for what cannot be one."""
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
    raise SourceError(
        f"a source is a path, a pandas or Dask DataFrame, a Dask Bag or a pyarrow table, not {type(source).__name__}"
    )


def records_source(
    records: Callable[[], Iterable[Mapping[str, Any] | str]],
    columns: Columns,
    schema: pa.Schema,
    count: Callable[[], int | None],
) -> Source:
    """Records whose types are known; one that is a text says what is wrong with it."""
    return TableSource(lambda: tables.record_chunks(records(), columns, schema), columns, schema, count)


def _open_path(path: Path, columns: Columns) -> Source:
    if not path.exists():
        raise SourceError(f"{path} does not exist")
    suffix = path.suffix.lower()
    if path.is_dir():
        return _open_folder(path, columns)
    if suffix in _PARQUET:
        return _parquet(path, [str(path)], columns)
    if suffix == ".csv":
        csv = partial(text_tables.csv_records, path)
        return _records(lambda: text_tables.csv_records(path), columns, lambda: sum(1 for _ in csv()))
    if suffix in _JSONL:
        if is_openai_batch(path):
            return OpenAIBatchSource(path)
        return _records(lambda: text_tables.jsonl_records(path), columns, lambda: text_tables.count_lines(path))
    if suffix in EXTRACTORS:
        return DocumentSource(path, columns.text)
    raise SourceError(f"{path} is of no kind that can be read: {', '.join((*_PARQUET, '.csv', *_JSONL, *EXTRACTORS))}")


def _open_folder(path: Path, columns: Columns) -> Source:
    tables_there = files_in(path, _PARQUET, hidden=(".", "_"))  # as everything that reads Parquet folders does
    documents = files_in(path, EXTRACTORS)
    if tables_there and documents:
        raise SourceError(f"{path} holds both Parquet files and documents ({documents[0].name}, ...): separate them")
    if tables_there:
        return _parquet(path, [str(file) for file in tables_there], columns)
    return DocumentSource(path, columns.text)


def _parquet(path: Path, files: list[str], columns: Columns) -> Source:
    try:
        data = ds.dataset(files, format="parquet")
        needed = columns.kept(data.schema).names + [name for name in columns.template if name in data.schema.names]
    except (pa.ArrowException, OSError) as error:
        raise SourceError(f"{path} cannot be read as Parquet: {error}") from error

    def batches() -> Iterable[pa.RecordBatch]:
        return data.to_batches(  # type: ignore[no-any-return]
            columns=list(dict.fromkeys(needed)), batch_size=tables.CHUNK, batch_readahead=1, fragment_readahead=1
        )

    return TableSource(_arrow(batches, columns), columns, data.schema, data.count_rows)


def _arrow(batches: Callable[[], Iterable[pa.RecordBatch]], columns: Columns) -> Callable[[], Iterable[tables.Chunk]]:
    return lambda: tables.arrow_chunks(batches(), columns)


def _records(
    records: Callable[[], Iterable[Mapping[str, Any] | str]], columns: Columns, count: Callable[[], int]
) -> Source:
    return records_source(records, columns, tables.inferred(records(), columns.text), count)
