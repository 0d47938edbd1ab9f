"""Draw the results of peers.py as bars, with the machine's floor in each.

python benchmarks/plots/peers.py results.json docs/peers.svg
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from distkv_dask.svg import PALETTE

WIDTH, LEFT, RIGHT, BAR = 760, 150, 120, 20
FLOOR = "#c9c9c9"
CASES = {
    "documents": "{documents} documents of {tokens:,} tokens, {new} new tokens each: seconds",
    "first-token": "One document of {tokens:,} tokens: seconds to the first token",
    "decode-6k": "Each token after it: ms",
    "extraction": "Each token of a passage repeated word for word: ms",
    "short-8": "A decode step of 8 short prompts: ms",
    "short-32": "A decode step of 32 short prompts: ms",
    "questions": "{questions} questions on one document, {answer} new tokens each: seconds",
}
"""Case -> heading, from the sizes of the run."""


def draw(content: Mapping[str, Any]) -> str:
    """The chart as SVG text; the grey part of a bar is the floor."""
    rows = [row for row in content["rows"] if "error" not in row]
    systems = list(dict.fromkeys(row["system"] for row in content["rows"]))
    colours = {system: PALETTE[at % len(PALETTE)] for at, system in enumerate(systems)}
    parts = [_text(16, 24, f"{content['processor']}, {content['cores']} cores; grey: what the machine allows", size=14)]
    y = 40.0
    for case, heading in CASES.items():
        if group := [row for row in rows if row["case"] == case]:
            parts.append(_text(16, y + 16, heading.format(**content["configuration"]), size=13))
            y = _bars(parts, group, colours, y + 24) + 10
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{y:.0f}" font-family="sans-serif">'
    return "\n".join([head, '<rect width="100%" height="100%" fill="white"/>', *parts, "</svg>\n"])


def _bars(parts: list[str], group: Sequence[Mapping[str, Any]], colours: Mapping[str, str], y: float) -> float:
    scale = (WIDTH - LEFT - RIGHT) / max(row["figure"] for row in group)
    for row in sorted(group, key=lambda row: row["figure"]):
        width, limit = row["figure"] * scale, row["figure"] / row["ratio_to_floor"] * scale
        parts += [
            _text(LEFT - 8, y + 13, row["system"], anchor="end"),
            f'<rect x="{LEFT}" y="{y}" width="{width:.1f}" height="{BAR - 4}" fill="{colours[row["system"]]}"/>',
            f'<rect x="{LEFT}" y="{y}" width="{min(width, limit):.1f}" height="{BAR - 4}" fill="{FLOOR}"/>',
            _text(LEFT + width + 6, y + 13, f"{row['figure']:.3g} {row['unit']}"),
        ]
        y += BAR
    return y


def _text(x: float, y: float, text: str, size: int = 12, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}">{escape(text)}</text>'


def main() -> None:
    """Read the results (first argument) and write the SVG (second argument)."""
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    Path(sys.argv[2]).write_text(draw(json.loads(Path(sys.argv[1]).read_text())))


if __name__ == "__main__":
    main()
