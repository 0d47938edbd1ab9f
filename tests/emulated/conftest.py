"""The emulated card for the tests in this folder: removed afterwards, so that other files of the process see none."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import emulated


@pytest.fixture(scope="module", autouse=True)
def card() -> Iterator[None]:
    """One card for the tests of a file."""
    if reason := emulated.missing():
        pytest.skip(reason)
    if emulated.installed():
        yield
        return
    emulated.install()
    try:
        yield
    finally:
        emulated.uninstall()
