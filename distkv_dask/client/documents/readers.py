"""Which library reads which document, and whether it is installed."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec
from typing import Literal, NamedTuple, get_args

from distkv_dask.errors import InvalidRequestError, MissingProgramError

Reader = Literal["auto", "pypdf", "docling"]
"""What reads documents: pypdf reads PDFs; docling reads PDFs with layout and tables, web pages, and formats that only
it reads; "auto" takes the fastest one that is installed."""

PLAIN = (".txt", ".md")
HTML = (".html", ".htm")
DOCUMENTS = (*PLAIN, *HTML, ".pdf", ".docx", ".pptx", ".epub")
"""Endings of documents' names."""


class Way(NamedTuple):
    """A library that reads a kind of file, and the extra that installs it."""

    library: str
    extra: str

    @property
    def is_here(self) -> bool:
        """Whether it is installed on this machine."""
        return find_spec(self.library) is not None


_HTML, _PDF, DOCLING = Way("selectolax", "html"), Way("pypdf", "pdf"), Way("docling", "docling")


def checked_reader(reader: str) -> None:
    """Raise :class:`InvalidRequestError` if there is no such reader."""
    if reader not in get_args(Reader):
        raise InvalidRequestError(f"reader is {reader!r:.100}, but must be one of {', '.join(get_args(Reader))}")


def way_of(suffix: str, reader: Reader) -> Way | None:
    """What reads files with an ending; None if they are plain text."""
    if suffix in PLAIN or suffix not in DOCUMENTS:
        return None
    if reader == "docling":
        return DOCLING
    if suffix == ".pdf":
        return DOCLING if reader == "auto" and DOCLING.is_here and not _PDF.is_here else _PDF
    return _HTML if suffix in HTML else DOCLING


def check_support(suffixes: Iterable[str], reader: Reader = "auto") -> None:
    """Check that files of these endings can be read.

    Raises
    ------
    InvalidRequestError
        When the reader cannot read them.
    MissingProgramError
        When what reads them is not installed.
    """
    for suffix in sorted(set(suffixes)):
        way, what = way_of(suffix, reader), suffix.removeprefix(".").upper()
        if way is None:
            continue
        if way is DOCLING and reader == "pypdf":
            raise InvalidRequestError(f"pypdf cannot read {what} files: leave out reader, then docling reads them")
        if not way.is_here:
            raise MissingProgramError(f"{what} files need {way.library}: pip install 'distkv-dask[{way.extra}]'")
