"""The texts of files, extracted by workers: several at once, ahead of the row that is answered next."""

from __future__ import annotations

from asyncio import CancelledError
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from threading import Lock
from typing import TYPE_CHECKING, Any

from distkv_dask.client.batch.means import result_of
from distkv_dask.client.batch.rows import Content, File, Row
from distkv_dask.client.batch.turns import turn
from distkv_dask.client.documents.extract import TextReader
from distkv_dask.client.documents.readers import Reader
from distkv_dask.errors import DistKVError

if TYPE_CHECKING:
    from distkv_dask.client.session.session import Session

AT_ONCE = 2
"""Files that a worker reads at once."""

AHEAD_BYTES = 1 << 28
"""Bytes of files that are read ahead, in addition to one file."""

Todo = Iterator[tuple[Row, str | None]]
"""Rows with a question each; those of one row follow each other."""

_readers: dict[Reader, list[TextReader]] = {}
_readers_lock = Lock()


def read_ahead(todo: Todo, session: Session) -> Todo:
    """The same rows, while workers read the files of those that follow; an error of ``todo`` comes after its rows."""
    left = _by_row(todo)
    ahead: deque[tuple[Row, list[str | None]]] = deque()
    sizes: deque[int] = deque()
    failure: Exception | None = None
    goes_on = True
    while True:
        while goes_on and len(ahead) < AT_ONCE * session.facts.workers and sum(sizes) <= AHEAD_BYTES:
            try:
                row, questions = next(left)
            except StopIteration:
                goes_on = False
            except Exception as error:
                failure, goes_on = error, False
            else:
                sizes.append(0 if row.file is None else len(row.file.data))
                ahead.append((_sent(row, session), questions))
        if not ahead:
            break
        row, questions = ahead.popleft()
        sizes.popleft()
        for question in questions:
            yield row, question
    if failure is not None:
        raise failure


def read_file(suffix: str, data: bytes, reader: Reader) -> str:
    """Extract a file's text; a task. Raises as :meth:`TextReader.text` does."""
    with turn("files", AT_ONCE):
        with _readers_lock:
            idle = _readers.setdefault(reader, [])
            one = idle.pop() if idle else TextReader(reader)
        try:
            return one.text(suffix, data)
        finally:
            with _readers_lock:
                idle.append(one)


def _by_row(todo: Todo) -> Iterator[tuple[Row, list[str | None]]]:
    """Each row with its questions."""
    row: Row | None = None
    questions: list[str | None] = []
    try:
        for other, question in todo:
            if row is not None and other is not row:
                yield row, questions
                questions = []
            row = other
            questions.append(question)
    except Exception:
        if row is not None:
            yield row, questions
        raise
    if row is not None:
        yield row, questions


def _sent(row: Row, session: Session) -> Row:
    """A row whose file is read by a worker."""
    if (file := row.file) is None:
        return row
    data = result_of(session, partial(session.client.scatter, file.data, hash=False))
    text = session.client.submit(read_file, file.suffix, data, file.reader, pure=False)
    return replace(row, read=partial(_read_there, file, text, row, session))


def _read_there(file: File, text: Any, row: Row, session: Session) -> Content:
    """The content of a row; its file is read here if workers died while reading it."""
    try:
        found: str = result_of(session, text.result)
    except DistKVError:
        raise
    except (Exception, CancelledError):
        return row.read()
    return file.content(found)
