"""Cases of a test of which one stands for others, which ``make test`` leaves to ``make test-thorough``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def some_of(cases: Iterable[Any], *by_default: Any) -> list[Any]:
    """Parameters of a test: all cases, those not named marked as thorough; a tuple is a value for each argument."""
    values = ((one, one if isinstance(one, tuple) else (one,)) for one in cases)
    return [pytest.param(*each, marks=[pytest.mark.thorough] * (one not in by_default)) for one, each in values]
