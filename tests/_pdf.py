"""PDF files with text on their pages."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest


def save_pdf(path: Path, pages: Sequence[str], times: int = 1) -> None:
    """Write a PDF whose pages show these texts, each ``times`` times; skips the test if pypdf is not installed."""
    pypdf = pytest.importorskip("pypdf")
    from pypdf.generic import DecodedStreamObject, DictionaryObject, NameObject

    writer = pypdf.PdfWriter()
    font = {"/Type": "/Font", "/Subtype": "/Type1", "/BaseFont": "/Helvetica"}
    named = DictionaryObject({NameObject(name): NameObject(value) for name, value in font.items()})
    fonts = DictionaryObject({NameObject("/F1"): writer._add_object(named)})
    for text in pages:
        page = writer.add_blank_page(200, 200)
        if text:
            content = DecodedStreamObject()
            content.set_data(b"BT /F1 12 Tf 20 100 Td " + f"({text}) Tj ".encode() * times + b"ET")
            page[NameObject("/Resources")] = DictionaryObject({NameObject("/Font"): fonts})
            page[NameObject("/Contents")] = writer._add_object(content)
    writer.write(path)
