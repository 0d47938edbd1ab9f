"""Rules of the house that no linter knows, held for every module of the package."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "distkv_dask"
MODULES = sorted(PACKAGE.rglob("*.py"))


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def reprs_of_errors(tree: ast.Module) -> Iterator[int]:
    """Lines that put the repr of a caught exception into a text: ``TimeoutError()`` says nothing to a user."""
    for handler in ast.walk(tree):
        if not isinstance(handler, ast.ExceptHandler):
            continue
        for one in ast.walk(handler):
            if isinstance(one, ast.FormattedValue) and one.conversion == ord("r"):
                yield from (
                    one.lineno for name in ast.walk(one) if isinstance(name, ast.Name) and name.id == handler.name
                )


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_message_shows_an_exception_as_python_writes_it(path: Path) -> None:
    assert list(reprs_of_errors(parsed(path))) == [], "say errors.in_words(error)"
