"""Small pictures of where KV is, as HTML for notebooks: a strip of spans, a colour for each worker. Pure.

Text has the colour of its surroundings, so that it is readable on light and dark; nothing is fetched from anywhere, and
all text that comes from users, models or machines is escaped.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import NamedTuple

PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#999999")
"""Okabe and Ito's, which colour-blind people can tell apart; workers beyond the eighth start over."""

WIDTH, HEIGHT = 480, 16

LEGEND = 16
"""Workers that a legend names one by one."""


class Piece(NamedTuple):
    """Tokens ``[start, stop)`` of a sequence on a worker, ``shared`` if they are a document's that others use, too."""

    worker: str
    start: int
    stop: int
    shared: bool = False


def colours(workers: Iterable[str]) -> dict[str, str]:
    """A colour for each worker, in the order given."""
    return {worker: PALETTE[at % len(PALETTE)] for at, worker in enumerate(dict.fromkeys(workers))}


def strip(pieces: Sequence[Piece], colour: Mapping[str, str], scale: int | None = None) -> str:
    """A bar of a sequence's tokens, coloured by worker; shared ones are faint. Hovering tells the positions.

    Parameters
    ----------
    pieces
        In order of position.
    colour
        By worker.
    scale
        Tokens of the full width; None is the sequence's own length.
    """
    end = max((piece.stop for piece in pieces), default=0)
    unit = WIDTH / max(end if scale is None else scale, 1)
    parts = []
    for piece in pieces:
        title = f"tokens {piece.start:,} to {piece.stop:,} on {piece.worker}" + (", a document's" * piece.shared)
        width = max((piece.stop - piece.start) * unit - 1, 1)  # a line of background parts the neighbours
        parts.append(
            f'<rect x="{piece.start * unit:.1f}" y="0" width="{width:.1f}" height="{HEIGHT}" '
            f'fill="{colour[piece.worker]}" fill-opacity="{0.55 if piece.shared else 1}">'
            f"<title>{escape(title)}</title></rect>"
        )
    return _svg(parts, f"{end:,} tokens on {counted(len({piece.worker for piece in pieces}), 'worker')}")


def meter(used: int, room: int, colour: str, title: str) -> str:
    """A bar of how much of a worker's room is in use."""
    width = WIDTH * min(used / room, 1) if room else 0
    return _svg(
        [
            f'<rect x="0" y="0" width="{WIDTH}" height="{HEIGHT}" fill="#808080" fill-opacity="0.25"/>',
            f'<rect x="0" y="0" width="{width:.1f}" height="{HEIGHT}" fill="{colour}">'
            f"<title>{escape(title)}</title></rect>",
        ],
        title,
    )


def legend(tokens: Mapping[str, int], colour: Mapping[str, str]) -> str:
    """Names of workers with their colours and numbers of tokens; those with fewest are only counted."""
    most = sorted(tokens, key=lambda worker: -tokens[worker])
    parts = [
        f'<span style="white-space:nowrap;margin-right:1em">'
        f'<span style="display:inline-block;width:0.8em;height:0.8em;background:{colour[worker]}"></span> '
        f"{escape(worker)}: {tokens[worker]:,}</span>"
        for worker in most[:LEGEND]
    ]
    if len(most) > LEGEND:
        parts.append(f"and {counted(len(most) - LEGEND, 'more worker')}")
    return f'<div style="font-size:smaller">{" ".join(parts)}</div>'


def tokens_by_worker(pieces: Iterable[Piece]) -> dict[str, int]:
    """Tokens of pieces on each worker, in the order in which workers come."""
    found: dict[str, int] = {}
    for piece in pieces:
        found[piece.worker] = found.get(piece.worker, 0) + piece.stop - piece.start
    return found


def spans(pieces: Sequence[Piece], colour: Mapping[str, str] | None = None) -> str:
    """A strip and its legend; empty without pieces."""
    if not pieces:
        return ""
    colour = colours(piece.worker for piece in pieces) if colour is None else colour
    return strip(pieces, colour) + legend(tokens_by_worker(pieces), colour)


def text(words: str) -> str:
    """Text as it is, with its line breaks; long ones can be scrolled."""
    return f'<div style="white-space:pre-wrap;max-height:16em;overflow-y:auto">{escape(words)}</div>'


def table(rows: Iterable[tuple[str, str, str]]) -> str:
    """Rows of a name, a picture (HTML) and what it says; names and words are escaped."""
    cell = "text-align:left;padding:2px 8px 2px 0"
    body = "".join(
        f'<tr><td style="{cell};min-width:12em">{escape(name)}</td><td style="{cell}">{picture}</td>'
        f'<td style="{cell}">{escape(words)}</td></tr>'
        for name, picture, words in rows
    )
    look = "border:none;margin:0;color:inherit;font-size:inherit"  # not every page passes it on to tables
    return f'<table style="{look}">{body}</table>' if body else ""


def counted(number: int, thing: str) -> str:
    """Number and noun, in the plural unless it is one."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def card(title: str, *lines: str) -> str:
    """A heading (escaped) over lines of HTML."""
    body = "".join(f"<div>{line}</div>" for line in lines if line)
    return f"<div><div><b>{escape(title)}</b></div>{body}</div>"


def _svg(parts: Iterable[str], label: str) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}"'
    return "".join([f'{head} style="max-width:100%" role="img" aria-label="{escape(label)}">', *parts, "</svg>"])
