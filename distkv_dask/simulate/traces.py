"""Request traces: arrival times and token counts, read from files as their publishers wrote them.

``.csv`` (Azure LLM inference traces)
    Columns ``TIMESTAMP`` (ISO date and time), ``ContextTokens``, ``GeneratedTokens``.
``.jsonl`` (Mooncake)
    One object a line with ``timestamp`` (milliseconds), ``input_length``, ``output_length``, and perhaps ``hash_ids``:
    one for each 512 tokens of the prompt, equal where prompts begin alike. Other fields are ignored.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from distkv_dask.errors import InvalidRequestError, in_words

Row = tuple[float, int, int, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request: its arrival in seconds after the first one, tokens of its prompt and of its answer.

    ``blocks`` has an id for each :data:`~distkv_dask.simulate.prompts.BLOCK` tokens of the prompt: prompts whose first
    ids agree begin alike. A prompt without ids shares no beginning.
    """

    at: float
    prompt: int
    output: int
    blocks: tuple[int, ...] = ()

    @property
    def tokens(self) -> int:
        """Tokens whose KV has to be stored: the last generated token's never is."""
        return self.prompt + self.output - 1


def read_trace(path: Path, speedup: float = 1.0, limit: int | None = None) -> list[Arrival]:
    """Read a trace, up to ``limit`` requests; its time passes ``speedup`` times as fast.

    Raises
    ------
    InvalidRequestError
        When the file's name or its content has neither format; the message names the line.
    """
    readers = {".csv": _azure, ".jsonl": _mooncake}
    if path.suffix not in readers:
        raise InvalidRequestError(f"{path} is not a trace: its name must end with {' or '.join(readers)}.")
    arrivals: list[Arrival] = []
    first = 0.0
    rows = readers[path.suffix](path)
    while limit is None or len(arrivals) < limit:
        try:
            seconds, prompt, output, blocks = next(rows)
        except StopIteration:
            break
        except (KeyError, ValueError, TypeError, OverflowError, RecursionError, csv.Error, OSError) as error:
            raise InvalidRequestError(
                f"{path}, request {len(arrivals) + 1}: {in_words(error)}. See distkv_dask.simulate.traces for the "
                "formats."
            ) from error
        first = first if arrivals else seconds
        arrivals.append(Arrival((seconds - first) / speedup, max(1, prompt), max(1, output), blocks))
    if not arrivals:
        raise InvalidRequestError(f"{path} has no requests.")
    return sorted(arrivals, key=lambda arrival: arrival.at)


def _azure(path: Path) -> Iterator[Row]:
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            stamp = datetime.fromisoformat(row["TIMESTAMP"][:26]).timestamp()
            yield stamp, int(row["ContextTokens"]), int(row["GeneratedTokens"]), ()


def _mooncake(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            blocks = tuple(int(number) for number in row.get("hash_ids", ()))
            yield row["timestamp"] / 1000, int(row["input_length"]), int(row["output_length"]), blocks
