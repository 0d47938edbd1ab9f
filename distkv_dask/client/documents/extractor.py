"""A separate program that extracts the text of documents; ``extract.py`` starts and ends it.

It imports nothing from the package, so that it starts fast. A file that exceeds its CPU time ends the process by a
signal, which also works within a library's C code.
"""

from __future__ import annotations

import io
import json
import os
import re
import resource
import signal
import socket
import sys
from collections.abc import Iterator
from functools import cache
from multiprocessing.connection import Connection
from typing import Any

MEMORY = {"docling": 12 << 30}
"""Bytes of address space that the program may use from the first file of a library on; others have :data:`LEAST`."""

LEAST = 2 << 30

IDLE = 60.0
"""Seconds without a file after which it ends: libraries keep their models in memory."""

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


def docling_text(suffix: str, data: bytes) -> str:
    """Markdown of a document; pages and slides end with a form feed each, where a file has them."""
    from docling.datamodel.base_models import ConversionStatus, DocumentStream

    try:
        done = _converter().convert(
            DocumentStream(name=f"file{suffix}", stream=io.BytesIO(data)), raises_on_error=False
        )
    except MemoryError:
        raise
    except Exception as error:
        raise Unreadable(_why(error)) from error
    if done.status not in (ConversionStatus.SUCCESS, ConversionStatus.PARTIAL_SUCCESS):
        said = "; ".join(one.error_message for one in done.errors) or done.status.value
        raise Unreadable(f"docling cannot read the file: {said:.200}")
    document = done.document
    plain = {"escape_html": False, "escape_underscores": False, "image_placeholder": ""}
    if not document.pages:
        text: str = document.export_to_markdown(**plain).replace("\f", "\n")
    else:
        pages = (document.export_to_markdown(page_no=page, **plain) for page in range(1, max(document.pages) + 1))
        text = "".join(page.replace("\f", "\n") + "\n\f" for page in pages)
    if not text.strip():
        raise Unreadable("the file holds no text: pictures of text need character recognition")
    return text


def _why(error: Exception) -> str:
    """What an error of docling says to users; its pipeline looks for models when it is made."""
    if any(isinstance(one, ImportError) for one in _causes(error)):
        return (
            f"docling on {socket.gethostname()} lacks what this kind of file needs: `pip install docling` installs all "
            "of it, and `docling-tools models download` its models for PDFs"
        )
    kinds = {kind.__name__ for one in _causes(error) for kind in type(one).__mro__}
    if kinds & {"LocalEntryNotFoundError", "OfflineModeIsEnabled", "FileNotFoundError"}:
        return (
            f"docling's models for layout, tables and character recognition are not on {socket.gethostname()}: run "
            "`docling-tools models download` there, or set DOCLING_ARTIFACTS_PATH to a folder that has them"
        )
    return f"docling cannot read the file: {_named(error):.200}"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


@cache
def _converter() -> Any:
    """Docling's converter, which keeps its models; it computes on one core, and opens no connection."""
    from docling.datamodel.accelerator_options import AcceleratorDevice, AcceleratorOptions
    from docling.datamodel.base_models import InputFormat
    from docling.datamodel.pipeline_options import PdfPipelineOptions
    from docling.datamodel.settings import settings
    from docling.document_converter import DocumentConverter, PdfFormatOption

    downloaded = settings.artifacts_path or settings.cache_dir / "models"
    options = PdfPipelineOptions(
        accelerator_options=AcceleratorOptions(num_threads=1, device=AcceleratorDevice.CPU),
        artifacts_path=downloaded if downloaded.is_dir() else None,
    )
    return DocumentConverter(format_options={InputFormat.PDF: PdfFormatOption(pipeline_options=options)})


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


READ = {"selectolax": html_text, "pypdf": pdf_text}


def main() -> None:
    """Read files until the other end closes, or none has come for a while."""
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    os.environ["HF_HUB_OFFLINE"] = "1"  # reading a file downloads nothing
    connection = Connection(int(sys.argv[1]))
    while connection.poll(IDLE):
        try:
            suffix, library, seconds = json.loads(connection.recv_bytes())
            data = connection.recv_bytes()
        except EOFError:
            return
        memory = MEMORY.get(library, LEAST)
        resource.setrlimit(resource.RLIMIT_AS, (memory, resource.RLIM_INFINITY))
        signal.setitimer(signal.ITIMER_PROF, seconds)
        try:
            text = docling_text(suffix, data) if library == "docling" else READ[library](data)
            answer = (
                {"text": text} if len(text) <= LONGEST else {"error": f"its text has more than {LONGEST:,} characters"}
            )
        except Unreadable as error:
            answer = {"error": str(error)}
        except MemoryError:
            answer = {"error": f"reading the file needs more than {memory >> 30} GiB of memory"}
        except Exception as error:  # any error of a library on this file
            answer = {"error": f"the file cannot be read: {_named(error):.200}"}
        signal.setitimer(signal.ITIMER_PROF, 0)
        connection.send_bytes(json.dumps(answer).encode())


if __name__ == "__main__":
    main()
