"""Draw the ratio of decode speed to the read roof by context length, from the results of micro_attention.py.

python benchmarks/plots/attention_roof.py results.json docs/attention_roof.svg
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 760, 400, 60, 250, 50, 50
COLOURS = {"native": "#1b6ca8", "numba": "#3c8d40", "torch": "#c46210", "flash, contiguous KV": "#7a7a7a"}
LABELS = {
    "native": "C++ core",
    "numba": "numba",
    "torch": "torch kernel (paged)",
    "flash, contiguous KV": "torch flash, no paging",
}
DASHES = ["", "6 4"]


def decode_points(results: list[dict[str, Any]], threads: int) -> dict[tuple[str, str], list[tuple[int, float]]]:
    """(context tokens, ratio) of each (implementation, shape)."""
    lines: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for result in results:
        words = result["case"].split(" ", 2)
        if (
            words[0] == "decode"
            and words[1].endswith("K,")
            and result["threads"] == threads
            and result["impl"] in LABELS
        ):
            tokens = int(words[1][:-2]) * 1024
            lines.setdefault((result["impl"], words[2]), []).append((tokens, result["ratio"]))
    return lines


def draw(lines: dict[tuple[str, str], list[tuple[int, float]]], title: str) -> str:
    """The chart as SVG text."""
    contexts = sorted({tokens for points in lines.values() for tokens, _ in points})
    highest = max(1.0, *(ratio for points in lines.values() for _, ratio in points))
    low, high = math.log2(contexts[0]), math.log2(contexts[-1])

    def place(tokens: int, ratio: float) -> tuple[float, float]:
        x = LEFT + (math.log2(tokens) - low) / (high - low) * (WIDTH - LEFT - RIGHT)
        return round(x, 1), round(HEIGHT - BOTTOM - ratio / highest * (HEIGHT - TOP - BOTTOM), 1)

    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" font-family="sans-serif">']
    parts += ['<rect width="100%" height="100%" fill="white"/>', f'<text x="{LEFT}" y="24">{title}</text>']
    for step in range(int(highest * 4) + 1):
        x, y = place(contexts[0], step / 4)
        stroke = "#333" if step == 4 else "#ddd"
        parts.append(f'<path d="M{x} {y}H{WIDTH - RIGHT}" stroke="{stroke}"/>')
        parts.append(f'<text x="{x - 8}" y="{y + 4}" font-size="12" text-anchor="end">{step / 4:g}</text>')
    for tokens in contexts:
        x, _ = place(tokens, 0)
        parts.append(f'<text x="{x}" y="{HEIGHT - 28}" font-size="12" text-anchor="middle">{tokens // 1024}K</text>')
    parts.append(f'<text x="{LEFT}" y="{HEIGHT - 8}" font-size="12">tokens of context; 1 is the read roof</text>')
    shapes = sorted({shape for _, shape in lines})
    for number, ((impl, shape), points) in enumerate(lines.items()):
        path = "M" + "L".join("{} {}".format(*place(*point)) for point in sorted(points))
        style = f'stroke="{COLOURS[impl]}" stroke-width="2" stroke-dasharray="{DASHES[shapes.index(shape)]}"'
        y = TOP + 16 + 44 * number
        parts.append(f'<path d="{path}" fill="none" {style}/>')
        parts.append(f'<path d="M{WIDTH - RIGHT + 16} {y}h24" {style}/>')
        parts.append(f'<text x="{WIDTH - RIGHT + 48}" y="{y}" font-size="12">{LABELS[impl]}</text>')
        parts.append(f'<text x="{WIDTH - RIGHT + 48}" y="{y + 14}" font-size="11" fill="#555">{shape}</text>')
    return "\n".join([*parts, "</svg>", ""])


def main() -> None:
    """Read the results (first argument) and write the SVG (second argument)."""
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    content = json.loads(Path(sys.argv[1]).read_text())
    threads = max(result["threads"] for result in content["results"])
    title = f"Decode attention against the read roof, {threads} threads, {content['environment']['hardware']}"
    Path(sys.argv[2]).write_text(draw(decode_points(content["results"], threads), title))


if __name__ == "__main__":
    main()
