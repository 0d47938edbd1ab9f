"""A picture of a measurement as SVG: bars of time to the first token, prefill and decode rates."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from distkv_dask.client.bench import Decode, Prefill
from distkv_dask.svg import PALETTE

WIDTH, LEFT, RIGHT, BAR = 640, 130, 110, 24

Bars = tuple[str, str, Sequence[tuple[str, float, str]]]


def plot(title: str, prefills: Sequence[Prefill], decodes: Sequence[Decode]) -> str:
    """One SVG with three groups of bars."""
    groups: list[Bars] = [
        (
            "Seconds to the first token, by prompt", PALETTE[0],
            [(_tokens(p), p.first_token_seconds, f"{p.first_token_seconds:.2f} s") for p in prefills],
        ),
        (
            "Prefill, by prompt", PALETTE[1],
            [(_tokens(p), p.tokens_per_second, f"{p.tokens_per_second:,.0f}/s") for p in prefills],
        ),
        (
            "Decode, by batch", PALETTE[2],
            [(f"{d.batch:,} at once", d.tokens_per_second, f"{d.tokens_per_second:,.1f}/s") for d in decodes],
        ),
    ]  # fmt: skip
    parts, y = [_text(16, 26, title, size=15)], 44
    for heading, colour, bars in groups:
        if bars:
            parts.append(_text(16, y + 16, heading, size=13))
            y = _bars(parts, bars, colour, y + 26) + 14
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{y}" font-family="sans-serif">'
    return "\n".join([head, '<rect width="100%" height="100%" fill="white"/>', *parts, "</svg>\n"])


def _tokens(point: Prefill) -> str:
    return f"{point.prompt_tokens:,} tokens"


def _bars(parts: list[str], bars: Sequence[tuple[str, float, str]], colour: str, y: int) -> int:
    longest = max(value for _, value, _ in bars) or 1
    for label, value, words in bars:
        width = (WIDTH - LEFT - RIGHT) * value / longest
        parts += [
            _text(LEFT - 8, y + 14, label, anchor="end"),
            f'<rect x="{LEFT}" y="{y}" width="{width:.1f}" height="{BAR - 6}" fill="{colour}"/>',
            _text(LEFT + width + 6, y + 14, words),
        ]
        y += BAR
    return y


def _text(x: float, y: float, text: str, size: int = 12, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}">{escape(text)}</text>'
