"""The text of a document file: plain text, Markdown, HTML or PDF."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from html.parser import HTMLParser
from importlib.util import find_spec
from typing import Any

from distkv_dask.errors import InvalidRequestError, MissingProgramError
from distkv_dask.texts import well_formed

_BLOCKS = re.compile(
    "address|article|aside|blockquote|br|d[dlt]|div|fieldset|figcaption|figure|footer|form|h[1-6]|header|hr|li|main|nav|"
    "[ou]l|p|pre|section|table|tbody|t[dhr]|tfoot|thead"
)
_HIDDEN = frozenset(("script", "style", "template", "noscript"))
_CHARSET = re.compile(rb"""<meta[^>]+charset=["']?([\w-]+)""", re.IGNORECASE)


def plain_text(data: bytes) -> str:
    """Text of a UTF-8 file."""
    return _decoded(data, "utf-8-sig")


def html_text(data: bytes) -> str:
    """What a reader of a web page sees, a line for each block."""
    declared = _CHARSET.search(data[:4096])
    page = _Page()
    page.feed(_decoded(data, declared.group(1).decode("ascii") if declared else "utf-8-sig"))
    page.close()
    lines = (re.sub(r"\s+", " ", line).strip() for line in "".join(page.pieces).split("\0"))
    return "\n".join(line for line in lines if line)


def pdf_text(data: bytes) -> str:
    """Text of all pages of a PDF."""
    from pypdf import PdfReader

    try:
        pages = [page.extract_text() for page in PdfReader(io.BytesIO(data)).pages]
    except Exception as error:  # of a damaged file: pypdf raises whatever its parser stumbles over
        raise InvalidRequestError(f"the PDF cannot be read: {error!r:.200}") from error
    text = well_formed("\n\n".join(pages))
    if not text.strip():
        raise InvalidRequestError("the PDF holds no text: scanned pages need character recognition first")
    return text


EXTRACTORS: dict[str, Callable[[bytes], str]] = {
    ".txt": plain_text,
    ".md": plain_text,
    ".html": html_text,
    ".htm": html_text,
    ".pdf": pdf_text,
}
"""Ending of a file's name -> bytes to text; raises InvalidRequestError for a file that cannot be read as such."""


def check_pdf_support() -> None:
    """Raise :class:`~distkv_dask.errors.MissingProgramError` where PDFs cannot be read."""
    if find_spec("pypdf") is None:
        raise MissingProgramError("PDF files need pypdf: pip install 'distkv-dask[pdf]'")


def _decoded(data: bytes, encoding: str) -> str:
    try:
        return data.decode(encoding)
    except (UnicodeDecodeError, LookupError) as error:
        raise InvalidRequestError(f"the file is not text in {encoding.removesuffix('-sig')}: {error}") from error


class _Page(HTMLParser):
    """Collects the text of a page; a NUL stands where a block begins or ends."""

    def __init__(self) -> None:
        super().__init__()
        self.pieces: list[str] = []
        self._hidden = 0

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self._hidden += tag in _HIDDEN
        if _BLOCKS.fullmatch(tag):
            self.pieces.append("\0")

    def handle_endtag(self, tag: str) -> None:
        if tag in _HIDDEN:
            self._hidden = max(0, self._hidden - 1)
        if _BLOCKS.fullmatch(tag):
            self.pieces.append("\0")

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.pieces.append(data.replace("\0", ""))
