"""The text of a document file: plain text and Markdown are read here, others by a process that can be ended."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import weakref
from multiprocessing.connection import Connection, Pipe
from pathlib import Path

from distkv_dask.client.documents.readers import DOCLING, Reader, way_of
from distkv_dask.client.files import open_file
from distkv_dask.errors import InvalidRequestError
from distkv_dask.texts import well_formed

LARGEST = 1 << 29
"""Maximum size of a document file in bytes."""

SECONDS = 15.0, 30.0
"""CPU seconds for extracting the text of a file: a constant, and an amount per MiB."""

LAYOUT_SECONDS = 120.0, 1200.0
"""The same for docling and a PDF, whose pages go through models one by one."""

_PROGRAM = Path(__file__).with_name("extractor.py")
_PATIENCE = 10
"""On a busy machine, a file fails after this multiple of its CPU time."""


def read_file(path: Path) -> bytes:
    """Read a document file.

    Raises
    ------
    OSError, InvalidRequestError
        When it cannot be read; when it is larger than :data:`LARGEST`.
    """
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        data = b"" if size > LARGEST else file.read(LARGEST + 1)  # a file may grow, or have no size
    if max(size, len(data)) > LARGEST:
        raise InvalidRequestError(f"it has more than {LARGEST:,} bytes: cut it into several files")
    return data


def plain_text(data: bytes) -> str:
    """Text of a file in UTF-8, or in the UTF-16 or -32 that its first bytes show.

    Raises
    ------
    InvalidRequestError
        When it is not text.
    """
    encoding = json.detect_encoding(data[:4])
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        shown = "" if encoding.startswith("utf-8") else f", nor in the {encoding} that its first bytes show"
        raise InvalidRequestError(f"the file is not text in utf-8{shown}: {error}") from error


class TextReader:
    """Gives the texts of files.

    All but plain text is read by a separate process. It is started on demand, has limits of time and memory for each
    file, and ends with this object or after an idle minute.

    Parameters
    ----------
    reader
        What reads them.
    """

    def __init__(self, reader: Reader = "auto") -> None:
        self.reader: Reader = reader
        self._process: _Process | None = None
        self._lock = threading.Lock()

    def text(self, suffix: str, data: bytes) -> str:
        """Return the text of a file, given the ending of its name and its bytes.

        Pages of PDFs and slides of presentations end with a form feed each.

        Raises
        ------
        InvalidRequestError
            When the file is not of the kind that its name says, or takes too much time or memory.
        """
        way = way_of(suffix, self.reader)
        if way is None:
            return plain_text(data)
        with self._lock:
            if self._process is not None and self._process.has_left():
                self._process = None
            self._process = process = self._process or _Process()
            limit = _limit(data, LAYOUT_SECONDS if way is DOCLING and suffix == ".pdf" else SECONDS)
            try:
                return process.text(suffix, way.library, data, limit)
            except EOFError:
                raise InvalidRequestError(
                    f"the file takes more than {limit:.0f} s to read"
                    if process.ended_by(signal.SIGPROF)
                    else "the process that read the file crashed: the file is damaged, or needs too much memory"
                ) from None
            finally:
                if process.busy:
                    process.end()
                    self._process = None


class _Process:
    """A process that runs ``extractor.py``."""

    def __init__(self) -> None:
        self._connection, theirs = Pipe()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(_PROGRAM), str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )
        self.busy = False
        self.end = weakref.finalize(self, _end, self._process, self._connection)

    def has_left(self) -> bool:
        """Whether the process has ended by itself, because it had nothing to do."""
        return self._process.poll() == 0

    def text(self, suffix: str, library: str, data: bytes, limit: float) -> str:
        """Have a file read within ``limit`` CPU seconds; raises EOFError if the process ends first."""
        self.busy = True
        try:
            self._connection.send_bytes(json.dumps([suffix, library, limit]).encode())
            self._connection.send_bytes(data)
            if not self._connection.poll(limit * _PATIENCE):
                self._process.send_signal(signal.SIGPROF)
                raise EOFError
            answer = json.loads(self._connection.recv_bytes())
        except OSError as error:
            raise EOFError from error
        self.busy = False
        if "error" in answer:
            raise InvalidRequestError(answer["error"])
        return well_formed(answer["text"])

    def ended_by(self, number: int) -> bool:
        """Whether a signal has ended the process; ends it otherwise."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(1.0)
        self.end()
        return self._process.returncode == -number


def _limit(data: bytes, seconds: tuple[float, float]) -> float:
    return seconds[0] + seconds[1] * len(data) / 2**20


def _end(process: subprocess.Popen[bytes], connection: Connection) -> None:
    connection.close()
    process.kill()
    process.wait()
