"""A separate program that extracts the text of HTML and PDF files; ``extract.py`` starts and ends it.

It imports nothing from the package, so that it starts fast. A file that exceeds its CPU time ends the process by a
signal, which also works within a library's C code.
"""

from __future__ import annotations

import io
import json
import re
import resource
import signal
import sys
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

MEMORY = 2 << 30
"""Bytes of address space that the program may use."""

LONGEST = 1 << 26
"""Maximum number of characters of a text."""

BLOCKS = re.compile(
    "address|article|aside|blockquote|body|br|caption|center|d[dlt]|details|dialog|dir|div|fieldset|figcaption|figure|"
    "footer|form|frameset|h[1-6]|head|header|hgroup|hr|html|legend|li|listing|main|menu|nav|ol|optgroup|option|p|"
    "plaintext|pre|search|section|summary|table|tbody|t[dhr]|tfoot|thead|title|ul|xmp"
)
HIDDEN = frozenset(("script", "style", "template", "noscript", "noembed", "noframes", "iframe"))

_COMMENT = re.compile(rb"<!--.*?(?:-->|\Z)", re.DOTALL)
_META = re.compile(rb"""<meta\s[^>]*?charset\s*=\s*["']?\s*([^\s"'/>;]+)""", re.IGNORECASE)
_XML = re.compile(rb"""\s*<\?xml\s[^>]*?encoding\s*=\s*["']([^"']+)""")
_UTF16 = {b"<\0": "utf-16le", b"\0<": "utf-16be"}


class Unreadable(Exception):
    """The error of a file."""


def html_text(data: bytes) -> str:
    """The visible text of a web page, with a line for each block."""
    from selectolax.lexbor import LexborHTMLParser

    pieces = "".join(_pieces(LexborHTMLParser(_decoded(data)).root))
    lines = (re.sub(r"\s+", " ", line).strip() for line in pieces.split("\0"))
    return "\n".join(line for line in lines if line)


def pdf_text(data: bytes) -> str:
    """Text of all pages of a PDF, a form feed at the end of each, as ``pdftotext`` writes it."""
    from pypdf import PdfReader

    try:
        pages = [page.extract_text() for page in PdfReader(io.BytesIO(data)).pages]
    except MemoryError:
        raise
    except Exception as error:  # pypdf's parser raises many kinds of errors for a damaged file
        raise Unreadable(f"the PDF cannot be read: {_named(error):.200}") from error
    text = "".join(page.replace("\f", "\n") + "\n\f" for page in pages)
    if not text.strip():
        raise Unreadable("the PDF holds no text: scanned pages need character recognition first")
    return text


def _pieces(root: Any) -> Iterator[str]:
    """Texts of a page in order, with a NUL, which no parsed text contains, where a block begins or ends."""
    node = root
    while node is not None:
        tag = node.tag
        if tag == "-text":
            yield (node.text_content or "").replace("\0", "")
        elif BLOCKS.fullmatch(tag):
            yield "\0"
        below = None if tag in HIDDEN else node.child
        while below is None and node is not None:
            if BLOCKS.fullmatch(node.tag):
                yield "\0"
            below, node = node.next, node.parent
        node = below


def _decoded(data: bytes) -> str:
    """A page decoded as in browsers: by its BOM, else its declaration, else UTF-8, else windows-1252."""
    import webencodings

    if data[:2] in _UTF16 and data[2:4] != b"\0\0":
        return _strictly(data, webencodings.lookup(_UTF16[data[:2]]))
    start = _COMMENT.sub(b"", data[:4096])
    declared = _XML.match(start) or _META.search(start)
    encoding = webencodings.lookup(declared.group(1).decode("latin-1")) if declared else None
    if encoding is not None and encoding.name.startswith("utf-16"):
        encoding = webencodings.UTF8  # a declaration that can be read as ASCII is not in UTF-16
    if encoding is not None and encoding.name == "x-user-defined":
        encoding = webencodings.lookup("windows-1252")
    if encoding is not None:
        return _strictly(data, encoding)
    try:
        return _strictly(data, webencodings.UTF8)
    except Unreadable:
        return _strictly(data, webencodings.lookup("windows-1252"))


def _strictly(data: bytes, encoding: Any) -> str:
    import webencodings

    try:
        text, encoding = webencodings.decode(data, encoding, "strict")
    except UnicodeDecodeError as error:
        raise Unreadable(f"the file is not text in {encoding.name}: {error}") from error
    return str(text)


def _named(error: Exception) -> str:
    """The text of an error, or its class if it has none."""
    return f"{type(error).__name__}: {error}".removesuffix(": ")


def main() -> None:
    """Read files until the other end closes."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    connection = Connection(int(sys.argv[1]))
    while True:
        try:
            suffix, seconds = json.loads(connection.recv_bytes())
            data = connection.recv_bytes()
        except EOFError:
            return
        signal.setitimer(signal.ITIMER_PROF, seconds)
        try:
            text = (pdf_text if suffix == ".pdf" else html_text)(data)
            answer = (
                {"text": text} if len(text) <= LONGEST else {"error": f"its text has more than {LONGEST:,} characters"}
            )
        except Unreadable as error:
            answer = {"error": str(error)}
        except MemoryError:
            answer = {"error": f"reading the file needs more than {MEMORY >> 30} GiB of memory"}
        except Exception as error:  # any error of a library on this file
            answer = {"error": f"the file cannot be read: {_named(error):.200}"}
        signal.setitimer(signal.ITIMER_PROF, 0)
        connection.send_bytes(json.dumps(answer).encode())


if __name__ == "__main__":
    main()
