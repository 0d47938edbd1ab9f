"""Files of text as a source: each file is a row, and its path is the row's label."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

import pyarrow as pa

from distkv_dask.client.batch.extract import EXTRACTORS, check_pdf_support
from distkv_dask.client.batch.rows import Content, Row, fingerprint
from distkv_dask.errors import InvalidRequestError, SourceError

_NOTHING = pa.RecordBatch.from_struct_array(pa.array([{}], pa.struct([])))


class DocumentSource:
    """A folder of ``.txt``, ``.md``, ``.html`` and ``.pdf`` files, read one at a time, in the order of their paths.

    Files of other kinds are left out. A file that comes to the folder later is a new row.

    Parameters
    ----------
    root
        A folder, searched with all folders in it, or a single file.
    text_column
        Name of a file's text in templates.
    """

    label = "path"
    kept = pa.schema([])

    def __init__(self, root: Path, text_column: str) -> None:
        self.fields = (text_column, "path")
        self._base = root if root.is_dir() else root.parent
        self._paths = files_in(root, EXTRACTORS) if root.is_dir() else [root]
        if not self._paths:
            raise SourceError(f"{root} holds no documents: files that end in {', '.join(EXTRACTORS)}")
        if any(path.suffix.lower() == ".pdf" for path in self._paths):
            check_pdf_support()

    def count(self) -> int:
        """Number of files."""
        return len(self._paths)

    def rows(self, start: int = 0) -> Iterator[Row]:
        """Read one file after the other."""
        for path in self._paths[start:]:
            name = os.fsencode(path.relative_to(self._base).as_posix()).decode("utf-8", "replace")
            try:
                data = path.read_bytes()
            except OSError as error:
                yield Row(name, fingerprint(str(error)), _NOTHING, partial(_fail, f"the file cannot be read: {error}"))
            else:
                yield Row(name, fingerprint(data), _NOTHING, partial(self._content, path, name, data))

    def _content(self, path: Path, name: str, data: bytes) -> Content:
        return Content({self.fields[0]: EXTRACTORS[path.suffix.lower()](data), "path": name})


def files_in(folder: Path, suffixes: Iterable[str], hidden: tuple[str, ...] = (".",)) -> list[Path]:
    """Return all files in a folder and in those below it that end in one of ``suffixes``, sorted.

    Names that begin as ``hidden`` says, of files or of folders, are left out.
    """
    wanted = frozenset(suffixes)
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in wanted
        and path.is_file()
        and not any(part.startswith(hidden) for part in path.relative_to(folder).parts)
    )


def _fail(message: str) -> Content:
    raise InvalidRequestError(message)
