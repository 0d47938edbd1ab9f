"""Pictures of simulations as SVG: throughput over policies, and how full each worker is over time."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Sequence

from distkv_dask.simulate.outcome import Outcome
from distkv_dask.simulate.report import figures

WIDTH, LEFT, TOP, BAR, COLUMNS = 760, 130, 40, 26, 120
SHADES = ("#f7fbff", "#deebf7", "#c6dbef", "#9ecae1", "#6baed6", "#4292c6", "#2171b5", "#08519c", "#08306b")


def plot(outcomes: Sequence[Outcome]) -> str:
    """One SVG: a bar of throughput for each policy, then a map of memory use for each of them."""
    inner = WIDTH - LEFT - 90
    rates = [figures(outcome)["throughput_tps"] for outcome in outcomes]
    parts = [_text(LEFT, 22, "Generated tokens per second", size=14)]
    y = TOP
    for outcome, rate in zip(outcomes, rates, strict=True):
        width = inner * rate / (max(rates) or 1)
        parts += [
            _text(LEFT - 8, y + 17, outcome.policy, anchor="end"),
            f'<rect x="{LEFT}" y="{y}" width="{width:.1f}" height="{BAR - 6}" fill="#2171b5"/>',
            _text(LEFT + width + 6, y + 15, f"{rate:,.0f} ({len(outcome.refused)} refused)"),
        ]
        y += BAR
    for outcome in outcomes:
        y += 34
        parts.append(_text(LEFT, y - 8, f"{outcome.policy}: memory in use, one row for each worker", size=14))
        y = _memory(parts, outcome, y, inner)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{y + 20}" font-family="sans-serif">'
    return "\n".join([head, '<rect width="100%" height="100%" fill="white"/>', *parts, "</svg>\n"])


def _memory(parts: list[str], outcome: Outcome, y: int, inner: int) -> int:
    times, end = [time for time, _ in outcome.memory], outcome.memory[-1][0]
    samples = [outcome.memory[bisect(times, end * at / COLUMNS) - 1][1] for at in range(COLUMNS)]
    workers = len(samples[0])
    height = max(2, min(10, 320 // workers))
    for worker, name in enumerate(samples[0]):
        shades = [min(len(SHADES) - 1, int(used.get(name, 0.0) * len(SHADES))) for used in samples]
        start = 0
        for at in range(1, COLUMNS + 1):  # equal neighbours are one rectangle
            if at == COLUMNS or shades[at] != shades[start]:
                x, width = LEFT + inner * start / COLUMNS, inner * (at - start) / COLUMNS
                fill = SHADES[shades[start]]
                row = y + worker * height
                parts.append(f'<rect x="{x:.1f}" y="{row}" width="{width:.2f}" height="{height}" fill="{fill}"/>')
                start = at
    bottom = y + workers * height
    parts.append(f'<rect x="{LEFT}" y="{y}" width="{inner}" height="{bottom - y}" fill="none" stroke="#888"/>')
    parts.append(_text(LEFT, bottom + 15, "0 s"))
    parts.append(_text(LEFT + inner, bottom + 15, f"{end:,.0f} s", anchor="end"))
    parts.append(_text(LEFT + inner + 8, y + 12, "dark: full"))
    return bottom + 18


def _text(x: float, y: float, text: str, size: int = 12, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}">{text}</text>'
