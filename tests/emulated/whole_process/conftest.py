"""These tests need the card from the start of their process, because libraries remember whether they found one.

``test_whole_process.py`` starts such a process, and ``make test DEVICE=emulated`` is one.
"""

import os

collect_ignore_glob = [] if os.environ.get("DISTKV_TEST_DEVICE") == "emulated" else ["test_*.py"]
