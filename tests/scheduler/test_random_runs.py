"""Random runs of the simulated cluster end with the right tokens, and with the ledger that the messages imply."""

from __future__ import annotations

import pytest
from _examples import examples
from _random_runs import run

PART = 10
"""Seeds of one test."""


@pytest.mark.parametrize("part", range(examples(15)))
def test_a_run_ends_with_right_tokens_and_the_ledger_that_its_messages_have_made(part: int) -> None:
    for seed in range(part * PART, (part + 1) * PART):
        try:
            run(seed)
        except AssertionError as error:
            raise AssertionError(f"run {seed}: {error}") from error
