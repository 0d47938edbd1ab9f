"""Files of text as a source: each file is a row, and its path is the row's label."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import pyarrow as pa

from distkv_dask.client.batch.rows import Content, Row, fingerprint
from distkv_dask.client.documents.extract import DOCUMENTS, TextReader, check_support, read_file
from distkv_dask.client.files import label_of
from distkv_dask.errors import InvalidRequestError, SourceError

_NOTHING = pa.RecordBatch.from_struct_array(pa.array([{}], pa.struct([])))


class DocumentSource:
    """``.txt``, ``.md``, ``.html`` and ``.pdf`` files, read one at a time, in the order of their paths.

    A file that is added to the folder later is a new row.

    Parameters
    ----------
    root
        The folder that paths are relative to, or a single file.
    text_column
        Name of a file's text in templates.
    paths
        The files; None is the single file.
    """

    label = "path"
    kept = pa.schema([])

    def __init__(self, root: Path, text_column: str, paths: Sequence[Path] | None = None) -> None:
        self.fields = (text_column, "path")
        self._base = root.parent if paths is None else root
        self._paths = [root] if paths is None else list(paths)
        if not self._paths:
            raise SourceError(f"{root} holds no documents, that is, files ending in {', '.join(DOCUMENTS)}")
        check_support(path.suffix.lower() for path in self._paths)
        self._reader = TextReader()

    def count(self) -> int:
        """Number of files."""
        return len(self._paths)

    def sizes(self) -> dict[int | str, int]:
        """Bytes of the files, by their labels; those that cannot be looked at are left out."""
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
                yield Row(name, fingerprint(data), _NOTHING, partial(self._content, path, name, data))

    def _content(self, path: Path, name: str, data: bytes) -> Content:
        return Content({self.fields[0]: self._reader.text(path.suffix.lower(), data), "path": name})


def _fail(message: str) -> Content:
    raise InvalidRequestError(message)
