"""The same events give the same commands in every process, so that failures can be reproduced."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

LIVES = """
import hashlib, sys
sys.path[:0] = sys.argv[1:]
import _simulated, test_liveness
enact = _simulated.Simulated.enact
seen = hashlib.sha256()
def enact_and_write_down(self, command):
    seen.update(repr(command).encode())
    enact(self, command)
_simulated.Simulated.enact = enact_and_write_down
for seed in (0, 2):
    test_liveness.live_through(seed)
print(seen.hexdigest())
"""


def test_commands_do_not_depend_on_the_order_in_which_a_process_happens_to_walk_through_sets() -> None:
    here = Path(__file__).parent
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", LIVES, str(here), str(here.parent)],
            env=os.environ | {"PYTHONHASHSEED": seed},
            stdout=subprocess.PIPE,
            text=True,
        )
        for seed in ("1", "2")
    ]
    seen = [process.communicate()[0] for process in processes]
    assert all(seen)
    assert len({*seen}) == 1
