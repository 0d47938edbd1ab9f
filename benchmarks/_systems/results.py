"""Rows and tables from the systems' answers: medians over turns, ratios to the floor and to ours."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import mean, median
from typing import Any

from _systems.cases import Case
from _systems.floors import Floor

OURS = "distkv"
"""Prefix of the names of our systems."""


@dataclass(frozen=True, slots=True)
class Run:
    """One turn of a case: seconds in all, and until each first and last token; peak memory in GB; prompts measured."""

    seconds: float
    firsts: tuple[float, ...]
    ends: tuple[float, ...]
    rss_gb: float
    measured: int
    begins: tuple[int, ...] = ()
    """The first token of each answer."""

    @classmethod
    def of(cls, reply: Mapping[str, Any], rss_gb: float, prompts: int) -> Run:
        """If only some prompts were measured, one after the other, the time of the others is extrapolated."""
        measured, shared = len(reply["firsts"]), reply["shared"]
        seconds = shared + (reply["seconds"] - shared) * prompts / measured
        begins = tuple(answer[0] for answer in reply["tokens"])
        return cls(seconds, tuple(reply["firsts"]), tuple(reply["ends"]), rss_gb, measured, begins)

    def step(self, new: int) -> float:
        """Mean seconds between tokens of an answer; at least a microsecond, if all came at once."""
        return max(mean(end - first for first, end in zip(self.firsts, self.ends, strict=True)) / (new - 1), 1e-6)


@dataclass(frozen=True, slots=True)
class Row:
    """One system in one case; ``figure`` is the case's result, in ``unit``. ``ratio_to_ours`` above 1 is slower.

    Figures are medians over turns; ``lowest`` and ``highest`` are the extremes of ``figure``. ``begins`` are the first
    tokens of its answers: with rounding in bfloat16, most but not all systems agree on them.
    """

    system: str
    case: str
    seconds: float
    prompt_tps: float
    decode_tps: float
    ttft_s: float
    rss_gb: float
    figure: float
    unit: str
    lowest: float
    highest: float
    measured: int
    ratio_to_floor: float
    begins: tuple[int, ...] = ()
    ratio_to_ours: float | None = None
    error: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """The row for JSON: numbers with four digits, and only the error if there is one."""
        if self.error is not None:
            return {"system": self.system, "case": self.case, "error": self.error}
        plain = {name: value for name, value in asdict(self).items() if name not in ("begins", "error")}
        return {name: float(f"{value:.4g}") if isinstance(value, float) else value for name, value in plain.items()}


Figure = Callable[[Run, Case], float]


def _seconds(run: Run, case: Case) -> float:
    return run.seconds


def _first(run: Run, case: Case) -> float:
    return run.firsts[0]


def _step(run: Run, case: Case) -> float:
    return run.step(case.new) * 1000


def figures(case: Case) -> dict[str, tuple[Figure, str]]:
    """Rows of a case: the figure of each, and its unit."""
    if case.name == "document":
        return {"first-token": (_first, "s"), "decode-6k": (_step, "ms")}
    if case.name == "extraction" or case.name.startswith("short"):
        return {case.name: (_step, "ms")}
    return {case.name: (_seconds, "s")}


def rows(system: str, case: Case, runs: Sequence[Run], floor: Floor) -> list[Row]:
    """Rows of one system in one case."""
    floors = {
        "first-token": floor.first,
        "decode-6k": floor.step * 1000,
        "extraction": floor.step * 1000,
        **dict.fromkeys(("questions", "documents", "spread"), floor.first + (case.new - 1) * floor.step),
    }
    found = []
    for name, (figure, unit) in figures(case).items():
        values = [figure(run, case) for run in runs]
        seconds, first = median(run.seconds for run in runs), median(max(run.firsts) for run in runs)
        prompts = len(case.document) + sum(map(len, case.prompts))
        found.append(
            Row(
                system, name, seconds,
                prompt_tps=prompts / first * runs[0].measured / len(case.prompts),
                decode_tps=runs[0].measured / median(run.step(case.new) for run in runs),
                ttft_s=median(run.firsts[0] for run in runs),
                rss_gb=max(run.rss_gb for run in runs),
                figure=median(values), unit=unit, lowest=min(values), highest=max(values), measured=runs[0].measured,
                ratio_to_floor=median(values) / floors.get(name, floor.step * 1000),
                begins=runs[0].begins,
            )
        )  # fmt: skip
    return found


def refused(system: str, case: str, error: str) -> Row:
    """A row for a system that did not answer, with its error."""
    return Row(system, case, *[0.0] * 6, "", 0.0, 0.0, 0, 0.0, error=error)


def started(system: str, seconds: float, rss_gb: float) -> Row:
    """A row for a system that has started and answered once."""
    return Row(system, "start", seconds, 0.0, 0.0, 0.0, rss_gb, seconds, "s", seconds, seconds, 1, 0.0)


def compared(found: Sequence[Row]) -> list[dict[str, Any]]:
    """Rows with their ratio to our best one of the same case, and the share of answers with the same first token."""
    ours: dict[str, Row] = {}
    for row in found:
        if row.system.startswith(OURS) and row.error is None:
            ours[row.case] = min(row, ours.get(row.case, row), key=lambda one: one.figure)
    plain = []
    for row in found:
        one = row.as_dict()
        if row.error is None and row.case in ours:
            best = ours[row.case]
            one["ratio_to_ours"] = float(f"{row.figure / best.figure:.3g}")
            if row.begins:
                pairs = [*zip(row.begins, best.begins, strict=False)]
                one["begins_as_ours"] = sum(a == b for a, b in pairs) / len(pairs)
        plain.append(one)
    return plain


def tables(found: Sequence[Mapping[str, Any]], titles: Mapping[str, Mapping[str, str]], processor: str) -> str:
    """Markdown: a table for each question, a line for each system.

    Parameters
    ----------
    found
        Rows of :func:`compared`.
    titles
        Question -> case -> the heading of its column.
    """
    parts = []
    for title, columns in titles.items():
        inside = [row for row in found if row["case"] in columns]
        if not inside:
            continue
        heads = [columns[name] for name in columns if any(row["case"] == name for row in inside)]
        names = [name for name in columns if any(row["case"] == name for row in inside)]
        lines = [f"### {title}", "", f"{processor}; in parentheses: multiples of the floor, and of our best time.", ""]
        lines += [f"| | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
        for system in dict.fromkeys(row["system"] for row in inside):
            cells = {row["case"]: _cell(row) for row in inside if row["system"] == system}
            lines.append(f"| {system} | {' | '.join(cells.get(name, '-') for name in names)} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _cell(row: Mapping[str, Any]) -> str:
    if "error" in row:
        return f"refused: {row['error']}"
    said = [f"{row['ratio_to_floor']:.2g}"] if row["ratio_to_floor"] else []
    said += [f"{row['ratio_to_ours']:.2f}"] if row.get("ratio_to_ours") else []
    digits = f"{row['figure']:.3g} {row['unit']}"
    return f"{digits} ({', '.join(said)})" if said else digits
