"""One system in its own process: it loads, then answers each line of JSON on stdin with a line of JSON.

It runs in the system's own environment, so it imports only the standard library and the module that drives the system.
What libraries print goes to stderr.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from typing import Any


def main(system: str, settings: dict[str, Any]) -> None:
    """Load, report that, and answer until stdin ends."""
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def reply(what: dict[str, Any]) -> None:
        replies.write(json.dumps(what) + "\n")

    try:
        with importlib.import_module(f"_systems.with_{system}").System(settings) as loaded:
            reply({"about": loaded.about})
            for line in sys.stdin:
                try:
                    reply(loaded.answer(**json.loads(line)))
                except Exception as error:  # any error of the system is its answer
                    reply({"error": said(error)})
    except Exception as error:
        reply({"error": said(error)})


def said(error: BaseException) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
