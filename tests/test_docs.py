"""What the documents refer to exists: tests, modules, files, pictures and links; and the site has every page."""

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


def anchors(document: Path) -> set[str]:
    """Anchors of a document's headings, as GitHub and mkdocs make them."""
    titles = re.findall(r"^#+ (.+)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title).strip().lower().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_link_and_picture_of_a_document_leads_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
        if re.match(r"https?://", target):
            continue
        name, _, anchor = target.partition("#")
        file = document.parent / name if name else document
        assert file.exists(), f"{document.name} leads to {target}"
        assert not anchor or anchor in anchors(file), f"{document.name} leads to {target}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_file_that_a_document_names_exists(document: Path) -> None:
    for name in re.findall(
        r"`((?:benchmarks|docs|examples|kernels|graphs)/[\w./-]+\.\w+)(?:::?\w+)?`", document.read_text()
    ):
        assert (ROOT / name).exists(), f"{document.name} names {name}"


YOURS = {"ask_many.py", "frame.py", "nearest.py"}
"""Modules that readers write."""
SOURCES = [
    str(path.relative_to(ROOT))
    for folder in ("distkv_dask", "kernels", "graphs", "tests", "benchmarks", "examples")
    for path in (ROOT / folder).rglob("*.*")
]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_module_that_a_document_names_exists(document: Path) -> None:
    ours = re.sub(r"^```(?:python|diff)\n.*?^```", "", document.read_text(), flags=re.MULTILINE | re.DOTALL)
    for name in set(re.findall(r"(?<![\w/.])((?:\w+/)*\w+\.py)\b", ours)) - YOURS:
        found = (ROOT / name).exists() or any(f"/{one}".endswith(f"/{name}") for one in SOURCES)
        assert found, f"{document.name} names {name}"


def test_the_site_has_every_page() -> None:
    listed = set(re.findall(r"([\w-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    assert listed == {page.name for page in (ROOT / "docs").glob("*.md")}
