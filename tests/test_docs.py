"""What the documents refer to exists: tests of the failure matrix, files."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_test_that_a_document_names_exists(document: Path) -> None:
    module = ""
    for name, test in re.findall(r"`([\w/]*test_\w+\.py)?(?:::(test_\w+))?`", document.read_text()):
        module = Path(name).name or module
        if not name and not test:
            continue
        found = list((ROOT / "tests").rglob(module))
        assert found, f"{document.name} names {module}"
        assert not test or f"def {test}(" in found[0].read_text(), f"{document.name} names {module}::{test}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_picture_that_a_document_shows_exists(document: Path) -> None:
    for picture in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", document.read_text()):
        assert (document.parent / picture).exists(), f"{document.name} shows {picture}"
