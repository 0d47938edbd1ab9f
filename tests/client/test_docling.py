"""Documents through docling: their text in order, tables as tables, and quotes with the number of their slide."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

pytest.importorskip("docling", reason="docling is not installed (extra: docling)")

from docx import Document
from pptx import Presentation
from pptx.util import Inches

from distkv_dask.client.batch.sources import open_source
from distkv_dask.client.batch.tables import Columns
from distkv_dask.client.documents import extract
from distkv_dask.client.documents.extract import TextReader
from distkv_dask.client.documents.prompts import read_text
from distkv_dask.errors import InvalidRequestError
from distkv_dask.quotes import Quoting
from tests._pdf import save_pdf

pytestmark = pytest.mark.thorough

READER = TextReader("docling")
TABLE = [["Region", "Sales"], ["North", "12"], ["South", "7"]]


def cells(text: str) -> list[list[str]]:
    """The cells of a Markdown table in a text."""
    lines = [line for line in text.splitlines() if line.startswith("|") and "--" not in line]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def save_docx(path: Path) -> None:
    document = Document()
    document.add_heading("The year <2030> & its_numbers", 1)
    document.add_paragraph("Profits rose in spring.")
    table = document.add_table(0, 2)
    for row in TABLE:
        for cell, text in zip(table.add_row().cells, row, strict=True):
            cell.text = text
    document.add_paragraph("Costs fell.")
    document.save(str(path))


def save_pptx(path: Path) -> None:
    """Four slides, of which the second is empty and the third has the table."""
    slides = Presentation()
    for at in range(4):
        slide = slides.slides.add_slide(slides.slide_layouts[6])
        if at == 2:
            table = slide.shapes.add_table(3, 2, Inches(1), Inches(1), Inches(4), Inches(2)).table
            for y, row in enumerate(TABLE):
                for x, text in enumerate(row):
                    table.cell(y, x).text = text
        elif at != 1:
            slide.shapes.add_textbox(
                Inches(1), Inches(1), Inches(4), Inches(1)
            ).text_frame.text = f"Slide {at + 1} says it"
    slides.save(str(path))


def save_epub(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("mimetype", "application/epub+zip")
        container = '<container xmlns="urn:oasis:names:tc:opendocument:xmlns:container"><rootfiles>'
        archive.writestr(
            "META-INF/container.xml", f'{container}<rootfile full-path="book.opf"/></rootfiles></container>'
        )
        items = "".join(f'<item id="c{at}" href="c{at}.xhtml" media-type="application/xhtml+xml"/>' for at in (1, 2))
        archive.writestr(
            "book.opf",
            f'<package xmlns="http://www.idpf.org/2007/opf"><metadata/><manifest>{items}</manifest>'
            '<spine><itemref idref="c2"/><itemref idref="c1"/></spine></package>',
        )
        for at in (1, 2):
            page = (
                f'<html xmlns="http://www.w3.org/1999/xhtml"><body><h1>Chapter {at}</h1><p>It rained.</p></body></html>'
            )
            archive.writestr(f"c{at}.xhtml", page)


def test_a_word_document_is_text_with_its_tables(tmp_path: Path) -> None:
    save_docx(tmp_path / "a.docx")
    text = read_text(tmp_path / "a.docx")
    assert "# The year <2030> & its_numbers" in text
    assert text.index("Profits rose in spring.") < text.index("Region") < text.index("Costs fell.")
    assert cells(text) == TABLE
    assert "\f" not in text


def test_a_presentation_says_on_which_slide_a_quote_is(tmp_path: Path) -> None:
    save_pptx(tmp_path / "a.pptx")
    text = read_text(tmp_path / "a.pptx")
    assert text.count("\f") == 4
    for words, slide in (("Slide 1 says it", 1), ("North", 3), ("Slide 4 says it", 4)):
        quote = Quoting(text, "answer").find(words)
        assert quote is not None
        assert (quote.page, text[quote.start : quote.stop]) == (slide, words)
    assert cells(text.split("\f")[2]) == TABLE


def test_a_book_is_its_chapters_in_reading_order(tmp_path: Path) -> None:
    save_epub(tmp_path / "a.epub")
    text = read_text(tmp_path / "a.epub")
    assert 0 <= text.index("Chapter 2") < text.index("Chapter 1") < text.rindex("It rained.")


def test_a_web_page_keeps_its_tables() -> None:
    rows = "".join(f"<tr><td>{one}</td><td>{two}</td></tr>" for one, two in TABLE)
    assert cells(READER.text(".html", f"<h1>T</h1><table>{rows}</table>".encode())) == TABLE


def test_a_pdf_says_which_models_are_missing_or_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "no-models"))
    monkeypatch.setenv("DOCLING_CACHE_DIR", str(tmp_path / "no-cache"))
    save_pdf(tmp_path / "a.pdf", ["Hello from a page"])
    with pytest.raises(InvalidRequestError, match="`docling-tools models download`"):
        read_text(tmp_path / "a.pdf", "docling")
    assert read_text(tmp_path / "a.pdf").startswith("Hello"), "pypdf needs none"


def test_bad_files_are_errors_of_their_rows_alone(tmp_path: Path) -> None:
    save_docx(tmp_path / "a.docx")
    for name in ("b.docx", "b.pptx", "b.epub"):
        (tmp_path / name).write_bytes(b"PK\x03\x04 nothing")
    (tmp_path / "~$a.docx").write_bytes(b"who has it open")
    Document().save(str(tmp_path / "empty.docx"))
    found = {}
    for row in open_source(tmp_path, Columns("text", None, ("text",)), None).rows():
        try:
            found[row.label] = str(row.read().values["text"])
        except InvalidRequestError as error:
            found[row.label] = f"! {error}"
    assert found.pop("empty.docx").startswith("! the file holds no text")
    assert "Profits" in found.pop("a.docx")
    assert set(found) == {"b.docx", "b.pptx", "b.epub"}
    assert all(text.startswith("! docling cannot read the file") for text in found.values())


def test_a_document_that_takes_too_long_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = TextReader()
    save_docx(tmp_path / "a.docx")
    assert "Profits" in reader.text(".docx", (tmp_path / "a.docx").read_bytes())
    document = Document()
    for _ in range(20_000):
        document.add_paragraph("x")
    document.save(str(tmp_path / "long.docx"))
    monkeypatch.setattr(extract, "SECONDS", (1.0, 0.0))
    with pytest.raises(InvalidRequestError, match="takes more than 1 s"):
        reader.text(".docx", (tmp_path / "long.docx").read_bytes())
    monkeypatch.undo()
    assert "Profits" in reader.text(".docx", (tmp_path / "a.docx").read_bytes())
