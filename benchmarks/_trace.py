"""Spans of a trace file (``distkv.trace``), by worker and lane."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Timed:
    """One span; times are in ms from the beginning of the trace, and missing numbers are -1."""

    name: str
    category: str
    began: float
    ended: float
    gang: int
    step: int
    layer: int
    peer: str
    size: int

    @property
    def ms(self) -> float:
        return self.ended - self.began

    def within(self, other: Timed) -> bool:
        return other.began <= self.began and self.ended <= other.ended


Lanes = dict[tuple[str, str], list[Timed]]


def read_trace(file: Path) -> Lanes:
    """Spans by (worker, lane), ordered by start."""
    events = json.loads(file.read_text())["traceEvents"]
    workers = {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}
    names = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    lanes: defaultdict[tuple[str, str], list[Timed]] = defaultdict(list)
    for event in events:
        if event["ph"] == "X":
            numbers = [event["args"].get(name, -1) for name in ("gang", "step", "layer")]
            began, peer, size = event["ts"] / 1000, event["args"].get("peer", ""), event["args"].get("size", 0)
            one = Timed(event["name"], event["cat"], began, began + event["dur"] / 1000, *numbers, peer, size)
            lanes[workers[event["pid"]], names[event["tid"]]].append(one)
    for lane in lanes.values():
        lane.sort(key=lambda one: (one.began, -one.ended))
    return dict(lanes)


def during(lane: list[Timed], frame: Timed) -> list[Timed]:
    """Spans of a lane inside ``frame``, clipped to it, without those that contain others."""
    return [
        Timed(one.name, one.category, max(one.began, frame.began), min(one.ended, frame.ended), one.gang, one.step,
              one.layer, one.peer, one.size)
        for one in lane
        if one.category != "frame" and one.began < frame.ended and one.ended > frame.began
    ]  # fmt: skip
