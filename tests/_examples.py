"""How many random cases a test tries: few in a normal run, ``EXAMPLES`` times as many in a nightly one."""

from __future__ import annotations

import os


def examples(few: int) -> int:
    """The number of cases, if a normal run tries ``few``."""
    return few * int(os.environ.get("EXAMPLES", "1"))
