"""Files of text as a source: each file is a row, and its path is the row's label."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import pyarrow as pa

from distkv_dask.client.batch.rows import Content, File, Row, fingerprint
from distkv_dask.client.documents.extract import TextReader, read_file
from distkv_dask.client.documents.readers import DOCUMENTS, Reader, check_support, way_of
from distkv_dask.client.files import label_of
from distkv_dask.errors import InvalidRequestError, SourceError

_NOTHING = pa.RecordBatch.from_struct_array(pa.array([{}], pa.struct([])))


class DocumentSource:
    """Files of documents, read one at a time, in the order of their paths.

    A file that is added to the folder later is a new row.

    Parameters
    ----------
    root
        The folder that paths are relative to, or a single file.
    text_column
        Name of a file's text in templates.
    paths
        The files; None is the single file.
    reader
        What reads them.
    """

    label = "path"
    kept = pa.schema([])

    def __init__(
        self, root: Path, text_column: str, paths: Sequence[Path] | None = None, reader: Reader = "auto"
    ) -> None:
        self.fields = (text_column, "path")
        self._base = root.parent if paths is None else root
        self._paths = [root] if paths is None else list(paths)
        if not self._paths:
            raise SourceError(f"{root} holds no documents, that is, files ending in {', '.join(DOCUMENTS)}")
        check_support((path.suffix.lower() for path in self._paths), reader)
        self._reader = TextReader(reader)

    def count(self) -> int:
        """Number of files."""
        return len(self._paths)

    def sizes(self) -> dict[int | str, int]:
        """Bytes of the files, by their labels; unreadable ones are left out."""
        found: dict[int | str, int] = {}
        for path in self._paths:
            with contextlib.suppress(OSError):
                found[label_of(path.relative_to(self._base))] = path.stat().st_size
        return found

    def rows(self, start: int = 0) -> Iterator[Row]:
        """Read one file after the other."""
        for path in self._paths[start:]:
            name = label_of(path.relative_to(self._base))
            try:
                data = read_file(path)
            except (OSError, InvalidRequestError) as error:
                yield Row(name, fingerprint(str(error)), _NOTHING, partial(_fail, f"the file cannot be read: {error}"))
            else:
                suffix = path.suffix.lower()
                file = File(suffix, data, self._reader.reader, partial(self._content, name))
                elsewhere = None if way_of(suffix, self._reader.reader) is None else file
                yield Row(name, fingerprint(data), _NOTHING, partial(self._read, file), elsewhere)

    def _read(self, file: File) -> Content:
        return file.content(self._reader.text(file.suffix, file.data))

    def _content(self, name: str, text: str) -> Content:
        return Content({self.fields[0]: text, "path": name})


def _fail(message: str) -> Content:
    raise InvalidRequestError(message)
