"""Tables of other libraries give the rows of an Arrow table, a few at a time, or an error that says what is wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from distributed import Client, Scheduler, Worker
from test_batch_sources import TABLE, opened, read

from distkv_dask import Engine, InvalidRequestError, SamplingParams, SourceError
from distkv_dask.client.batch import table_folders
from distkv_dask.client.batch.tables import CHUNK, Columns
from distkv_dask.errors import MissingProgramError
from tests._cluster import engine_test
from tests._models import text_model_dir
from tests._thorough import some_of

TEXT = Columns("text", None, ("text",))


class Capsule:
    """Only a C stream, with string views as in polars."""

    def __init__(self, table: pa.Table) -> None:
        self._table = table

    def __arrow_c_stream__(self, requested_schema: object = None) -> object:
        views = [pa.string_view() if pa.types.is_string(field.type) else field.type for field in self._table.schema]
        return self._table.cast(pa.schema(list(zip(self._table.column_names, views, strict=True)))).__arrow_c_stream__()


def dataset(table: pa.Table, folder: Path) -> ds.Dataset:
    half = len(table) // 2
    for at, part in enumerate((table.slice(0, half), table.slice(half))):
        pq.write_table(part, folder / f"{at}.parquet")
    return ds.dataset(folder)


def delta(table: pa.Table, folder: Path) -> Any:
    deltalake = pytest.importorskip("deltalake", reason="deltalake is not installed (extra: tables)")
    deltalake.write_deltalake(folder, table)
    return deltalake.DeltaTable(folder)


def delta_folder(table: pa.Table, folder: Path) -> Path:
    """A table whose files contain deleted rows."""
    more = table.slice(0, 1).set_column(0, "id", pa.array(["deleted"] * min(1, len(table)), pa.string()))
    delta(pa.concat_tables([table, more]), folder).delete("id = 'deleted'")
    return folder


def iceberg(table: pa.Table, folder: Path) -> Any:
    pytest.importorskip("pyiceberg", reason="pyiceberg is not installed (extra: tables)")
    from pyiceberg.catalog.sql import SqlCatalog

    catalog = SqlCatalog("here", uri=f"sqlite:///{folder}/catalog.db", warehouse=f"file://{folder}")
    catalog.create_namespace("a")
    made = catalog.create_table("a.b", table.schema)
    if len(table):
        made.append(table)
    return made


def hugging_face(table: pa.Table) -> Any:
    return pytest.importorskip("datasets", reason="datasets is not installed (extra: tables)").Dataset(table)


def saved(table: pa.Table, folder: Path) -> Path:
    hugging_face(table).save_to_disk(folder / "saved")
    return folder / "saved"


def shuffled_back(table: pa.Table, folder: Path) -> Any:
    """Rows ordered by an index over the table, as after sorting and filtering."""
    some = hugging_face(table)
    return some.select(range(len(table))[::-1]).select(range(len(table))[::-1])


def polars(table: pa.Table, folder: Path) -> Any:
    return pytest.importorskip("polars", reason="polars is not installed (extra: tables)").from_arrow(table)


def duckdb(table: pa.Table, folder: Path) -> Any:
    library = pytest.importorskip("duckdb", reason="duckdb is not installed (extra: tables)")
    return library.connect().from_arrow(table)


KINDS: dict[str, Callable[[pa.Table, Path], Any]] = {
    "dataset": dataset,
    "scanner": lambda table, folder: dataset(table, folder).scanner(),
    "capsule": lambda table, folder: Capsule(table),
    "polars": polars,
    "duckdb": duckdb,
    "datasets": lambda table, folder: hugging_face(table),
    "datasets-with-indices": shuffled_back,
    "datasets-streamed": lambda table, folder: hugging_face(table).to_iterable_dataset(),
    "datasets-saved": saved,
    "delta": delta,
    "delta-folder": delta_folder,
    "iceberg": iceberg,
    "iceberg-scan": lambda table, folder: iceberg(table, folder).scan(),
}
each_kind = pytest.mark.parametrize("kind", some_of(KINDS, "dataset", "scanner", "capsule"))


@each_kind
def test_the_same_table_gives_the_same_rows_whatever_library_has_it(kind: str, tmp_path: Path) -> None:
    source = opened(KINDS[kind](TABLE, tmp_path))
    expected = read(opened(TABLE))
    assert read(source) == expected
    assert read(source) == expected  # a second pass starts over
    assert source.kept.names == ["id", "pages"]
    assert source.count() in (None, 4)
    assert [row.fingerprint for row in source.rows()] == [row.fingerprint for row in opened(TABLE).rows()]


@each_kind
def test_a_table_of_any_library_may_be_empty_or_lack_a_column(kind: str, tmp_path: Path) -> None:
    if kind in ("datasets-streamed", "datasets-saved"):
        pytest.skip("datasets can neither stream a table without rows nor load it from disk")
    source = KINDS[kind](TABLE.slice(0, 0), tmp_path)
    assert read(opened(source)) == []
    with pytest.raises(SourceError, match=r"no column .body."):
        opened(source, Columns("body", None, ("body",)))


NESTED = pa.table(
    {
        "text": pa.array(["a", None, "c"]),
        "list": pa.array([[1, 2], None, []], pa.list_(pa.int64())),
        "struct": pa.array([{"x": 1, "y": ["z"]}, None, {"x": 2, "y": None}]),
    }
)


@each_kind
def test_nulls_cost_their_row_and_nested_values_are_kept(kind: str, tmp_path: Path) -> None:
    if kind == "delta-folder":
        pytest.skip("its rows are told apart by a column that this table has not")
    found = read(opened(KINDS[kind](NESTED, tmp_path), TEXT))
    assert [row[1:3] for row in found] == [([1, 2], {"x": 1, "y": ["z"]}), (None, None), ([], {"x": 2, "y": None})]
    assert [row[3] for row in found] == ["a", "! column 'text' is empty (null)", "c"]
    (tmp_path / "again").mkdir()
    of_structs = Columns("struct", ["text"], ("struct",))
    errors = [row[-1] for row in read(opened(KINDS[kind](NESTED, tmp_path / "again"), of_structs))]
    assert ["should be text" in one for one in errors] == [True, False, True]


def test_a_stream_is_read_as_far_as_its_rows_are_asked_for() -> None:
    begun = 0

    def batches() -> Iterator[pa.RecordBatch]:
        nonlocal begun
        for at in range(1000):
            begun += 1
            yield pa.record_batch({"text": [f"{at}-{row}" for row in range(CHUNK)]})

    schema = pa.schema([("text", pa.string())])
    reader = pa.RecordBatchReader.from_batches(schema, batches())
    rows = opened(reader, TEXT).rows()
    assert [next(rows).read().values["text"] for _ in range(3 * CHUNK)][-1] == f"2-{CHUNK - 1}"
    assert begun <= 5


def test_a_stream_that_was_read_says_so_instead_of_being_empty() -> None:
    reader = TABLE.to_reader()
    assert len(read(opened(reader))) == 4
    with pytest.raises(SourceError, match="was read before: create a new one"):
        read(opened(reader))


def test_what_is_no_table_is_named() -> None:
    with pytest.raises(SourceError, match=r"ChunkedArray cannot be read as a table"):
        opened(pa.chunked_array([[1, 2]]))
    with pytest.raises(SourceError, match=r"Arrow stream .*, not dict"):
        opened({"text": ["a"]})


@pytest.mark.parametrize(
    ("files", "library"),
    [(["_delta_log/0.json"], "deltalake"), (["dataset_info.json", "state.json"], "datasets")],
    ids=["delta", "datasets"],
)
def test_a_folder_of_a_table_format_is_never_read_file_by_file(
    files: list[str], library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pq.write_table(TABLE, tmp_path / "deleted.parquet")
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    if table_folders.find_spec(library) is not None:
        with pytest.raises(SourceError, match="cannot be opened as"):
            opened(tmp_path)
    monkeypatch.setattr(table_folders, "find_spec", lambda name: None)
    with pytest.raises(MissingProgramError, match=rf"needs {library}: pip install 'distkv-dask\[tables\]'"):
        opened(tmp_path)


def test_folders_of_several_tables_and_of_a_catalog_say_what_to_name(tmp_path: Path) -> None:
    for name in ("test", "train"):
        (tmp_path / "all" / name).mkdir(parents=True)
        for file in ("dataset_info.json", "state.json"):
            (tmp_path / "all" / name / file).write_text("{}")
    (tmp_path / "all" / "dataset_dict.json").write_text("{}")
    with pytest.raises(SourceError, match=r"the splits test, train: name one"):
        opened(tmp_path / "all")
    (tmp_path / "ice" / "metadata").mkdir(parents=True)
    (tmp_path / "ice" / "metadata" / "1.metadata.json").write_text("{}")
    pq.write_table(TABLE, tmp_path / "ice" / "deleted.parquet")
    with pytest.raises(SourceError, match="catalog"):
        opened(tmp_path / "ice")


FEW = SamplingParams(max_new_tokens=4, ignore_eos=True)
ROWS = 2 * CHUNK


@engine_test()
async def test_a_table_that_changes_while_it_is_read_ends_the_batch_which_goes_on_when_it_is_back(
    client: Client, scheduler: Scheduler, *workers: Worker
) -> None:
    folder = Path(workers[0].local_directory)
    (folder / "table").mkdir()
    source = dataset(pa.table({"text": [f"Report {at}" for at in range(ROWS)]}), folder / "table")
    out = folder / "out"
    async with Engine(client, str(text_model_dir()), dtype="float32", kv_memory="8 MiB", block_tokens=8) as engine:
        last = (folder / "table" / "1.parquet").rename(folder / "away")
        with pytest.raises(SourceError, match="cannot be read any further"):
            await engine.process(source, out=out, sampling=FEW, progress=False)
        kept = len(pq.read_table(out))
        assert kept <= CHUNK
        last.rename(folder / "table" / "1.parquet")
        done = await engine.process(source, out=out, sampling=FEW, progress=False)
        assert (done.rows, done.errors) == (ROWS, 0)
        assert done.earlier == kept, "what was answered is not answered again"
        assert sorted(pq.read_table(out, columns=["row"])["row"].to_pylist()) == list(range(ROWS))

        other = pa.table({"text": [f"Report {ROWS - at}" for at in range(ROWS)]})
        with pytest.raises(SourceError, match="has changed since it was answered"):
            await engine.process(Capsule(other), out=out, sampling=FEW, progress=False)
        with pytest.raises(InvalidRequestError, match=r"FileSystemDataset by this process only: name an output"):
            await engine.process(source, sampling=FEW)
        estimate = await engine.estimate(source, sampling=FEW)
        assert estimate.rows == ROWS
