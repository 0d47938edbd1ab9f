"""Draw one decode step, home above holder, from a trace file: the whole step, and two of its layers enlarged.

python benchmarks/where_time_goes.py --trace trace.json
python benchmarks/plots/decode_step.py trace.json docs/decode-step.svg
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from _trace import Lanes, Timed, during, read_trace

WIDTH, LEFT, RIGHT, BAR, GAP = 960, 90, 20, 34, 12
COLOURS = {
    "model": "#1b6ca8",
    "local attention": "#2a9d8f",
    "attend": "#2a9d8f",
    "merge": "#8ab17d",
    "send": "#e76f51",
    "receive": "#e9a26b",
    "wait": "#c9c9c9",
    "idle": "#ececec",
    "begin": "#a8a8a8",
}
LABELS = {
    "model": "model without attention",
    "attend": "attention over the own span",
    "merge": "merge",
    "send": "send",
    "receive": "receive",
    "wait": "home waits for the partial",
    "idle": "holder idle",
}


def typical_step(lanes: Lanes) -> tuple[str, Timed]:
    """The home, and its step of median duration."""
    home = max(lanes, key=lambda key: sum(one.name == "step" for one in lanes[key]))
    steps = sorted((one for one in lanes[home] if one.name == "step" and one.step > 1), key=lambda one: one.ms)
    return home[0], steps[len(steps) // 2]


def panel(lanes: list[tuple[str, list[Timed]]], frame: Timed, top: float, title: str) -> list[str]:
    """Bars of the lanes from the beginning of ``frame`` to its end, below ``top``."""
    scale = (WIDTH - LEFT - RIGHT) / frame.ms
    parts = [f'<text x="{LEFT}" y="{top + 14}" font-size="13">{title}</text>']
    for number, (name, spans) in enumerate(lanes):
        y = top + 24 + number * (BAR + GAP)
        parts.append(f'<text x="{LEFT - 10}" y="{y + BAR / 2 + 4}" font-size="12" text-anchor="end">{name}</text>')
        for one in during(spans, frame):
            x, width = LEFT + (one.began - frame.began) * scale, max(one.ms * scale, 0.15)
            parts.append(f'<rect x="{x:.2f}" y="{y}" width="{width:.2f}" height="{BAR}" fill="{COLOURS[one.name]}"/>')
    y = top + 24 + len(lanes) * (BAR + GAP)
    for tick in range(6):
        x = LEFT + (WIDTH - LEFT - RIGHT) * tick / 5
        parts.append(f'<path d="M{x:.1f} {y - GAP + 3}v5" stroke="#333"/>')
        parts.append(
            f'<text x="{x:.1f}" y="{y + 12}" font-size="11" text-anchor="middle">{frame.ms * tick / 5:.3g} ms</text>'
        )
    return parts


def arrows(home: list[Timed], holder: list[Timed], frame: Timed, top: float) -> list[str]:
    """Lines from the sending of a query to the holder's work on it, and from there to the end of the home's wait."""
    scale, parts = (WIDTH - LEFT - RIGHT) / frame.ms, []
    answers = {(one.gang, one.step, one.layer): one for one in holder if one.name == "answer"}
    low, high = top + 24 + BAR, top + 24 + BAR + GAP
    for one in home:
        answer = answers.get((one.gang, one.step, one.layer))
        if one.name in ("send", "wait") and one.within(frame) and answer is not None:
            ends = (one.began, low, answer.began, high) if one.name == "send" else (answer.ended, high, one.ended, low)
            x1, x2 = (LEFT + (at - frame.began) * scale for at in ends[::2])
            parts.append(f'<path d="M{x1:.1f} {ends[1]}L{x2:.1f} {ends[3]}" stroke="#333"/>')
    return parts


def draw(lanes: Lanes) -> str:
    """The picture as SVG text."""
    home, step = typical_step(lanes)
    holder = next(worker for worker, lane in lanes if worker != home and lane == "holder lane")
    bars = [("home", lanes[home, "home lane"]), ("holder", lanes[holder, "holder lane"])]
    layers = [one for one in bars[0][1] if one.name == "model" and one.within(step)]
    middle = (len(layers) - 2) // 2
    zoom = Timed("zoom", "frame", layers[middle].began, layers[middle + 2].began, -1, -1, -1, "", -1)
    height = 2 * (24 + 2 * (BAR + GAP) + 24) + 70
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" font-family="sans-serif">']
    parts.append('<rect width="100%" height="100%" fill="white"/>')
    parts += panel(bars, step, 10, f"One decode step of {len(layers) - 1} layers, {step.ms:.1f} ms")
    top = 10 + 24 + 2 * (BAR + GAP) + 34
    parts += panel(bars, zoom, top, f"Two of its layers ({middle} and {middle + 1})")
    parts += arrows(bars[0][1], bars[1][1], zoom, top)
    x, y = LEFT, height - 16
    for name, label in LABELS.items():
        parts.append(f'<rect x="{x}" y="{y - 10}" width="12" height="12" fill="{COLOURS[name]}"/>')
        parts.append(f'<text x="{x + 16}" y="{y}" font-size="11">{label}</text>')
        x += 30 + round(6.1 * len(label))
    return "\n".join([*parts, "</svg>", ""])


def main() -> None:
    """Read the trace (first argument) and write the SVG (second argument)."""
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    Path(sys.argv[2]).write_text(draw(read_trace(Path(sys.argv[1]))))


if __name__ == "__main__":
    main()
