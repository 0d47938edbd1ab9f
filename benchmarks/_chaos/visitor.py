"""A client in its own process, which sends many requests and waits to be killed.

``python visitor.py SCHEDULER ENGINE [CA CERTIFICATE KEY]`` prints ``asked`` once all of its requests are running.
"""

from __future__ import annotations

import sys
from pathlib import Path

from distributed import Client

sys.path.append(str(Path(__file__).resolve().parent.parent))
from _chaos.certificates import security
from distkv_dask import Engine, SamplingParams

LONG = SamplingParams(max_new_tokens=150, ignore_eos=True)


def main() -> None:
    scheduler, engine, *files = sys.argv[1:]
    encrypted = security(*map(Path, files)) if files else None
    with Client(scheduler, security=encrypted) as client, Engine.attach(engine, client) as visited:
        document = visited.ingest("All that a visitor wants to know. " * 6, "visitor")
        asked = [document.submit(question, LONG) for question in ("Who?", "What?")]
        asked += [visited.submit([number] * 100, LONG) for number in range(1, 4)]
        print("asked", flush=True)
        while True:  # until it is killed
            for one in asked:
                one.result()
            asked = [visited.submit([number] * 100, LONG) for number in range(1, 4)]


if __name__ == "__main__":
    main()
