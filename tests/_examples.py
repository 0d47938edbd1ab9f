"""How many random cases a test tries: few in every run, ``EXAMPLES`` times as many in a nightly one."""

from __future__ import annotations

import os


def examples(few: int) -> int:
    """The number of cases where a run of all tests tries ``few``."""
    return few * int(os.environ.get("EXAMPLES", "1"))
