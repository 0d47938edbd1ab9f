"""A run of all cases: systems take turns, the machine's rates are measured in between, and results are collected."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from _systems.cases import Case
from _systems.floors import Machine, Model, floor
from _systems.process import Child, Refused, System
from _systems.results import Row, Run, refused, rows, started


@dataclass(slots=True)
class Comparison:
    """Measures systems, and holds the results so far.

    Parameters
    ----------
    environments
        Folder with the peers' environments.
    turns
        Turns of each case that is not ``slow``.
    measure
        Measures the machine's rates.
    """

    environments: Path
    turns: int
    measure: Callable[[], Machine]
    machine: Machine = field(default_factory=lambda: Machine(0.0, 0.0))
    about: dict[str, str] = field(default_factory=dict)
    runs: dict[tuple[str, Case], list[Run]] = field(default_factory=dict)
    others: list[Row] = field(default_factory=list)
    """Rows for starts and refusals."""

    def run(self, systems: Mapping[str, System], todo: Sequence[Case]) -> None:
        """Run cases one after the other, with the processes of all systems open."""
        with ExitStack() as stack:
            children: dict[str, Child] = {}
            for name, system in systems.items():
                if child := self._start(name, system, todo[0]):
                    children[name] = stack.enter_context(child)
            for case in todo:
                self._turns({name: child for name, child in children.items() if systems[name].answers(case)}, case)

    def rows(self, model: Model) -> list[Row]:
        """Rows for all measurements, with floors from the highest rates of the run."""
        return [
            *self.others,
            *(
                row
                for (name, case), runs in self.runs.items()
                for row in rows(name, case, runs, floor(model, self.machine, case))
            ),
        ]

    def _start(self, name: str, system: System, case: Case) -> Child | None:
        """Start a process and have it answer once; if it refuses, return None and record a row that says why."""
        print(f"starting {name}", flush=True)
        began = time.perf_counter()
        try:
            child = Child(name, system, self.environments)
            try:
                _, memory = child.ask(case.shortest)
            except BaseException:
                child.close()
                raise
        except Refused as refusal:
            self.others.append(refused(name, case.name if system.small else "start", str(refusal)))
            return None
        self.about[name] = child.about
        if not system.small:
            self.others.append(started(name, time.perf_counter() - began, memory))
        return child

    def _turns(self, children: dict[str, Child], case: Case) -> None:
        """Run one case: systems take turns, a different one first each time; one that refuses is not asked again."""
        for turn in range(1 if case.slow else self.turns):
            self.machine = self.machine.faster(self.measure())
            order = [*children]
            first = turn % max(len(order), 1)
            for name in order[first:] + order[:first]:
                try:
                    reply, memory = children[name].ask(case.request(name))
                except Refused as refusal:
                    self.others.append(refused(name, case.name, str(refusal)))
                    del children[name]
                    continue
                self._note(name, case, reply, memory)

    def _note(self, name: str, case: Case, reply: Mapping[str, Any], memory: float) -> None:
        run = Run.of(reply, memory, len(case.prompts))
        self.runs.setdefault((name, case), []).append(run)
        print(f"{case.name}, {name}: {run.seconds:.2f} s, first token {run.firsts[0]:.2f} s", flush=True)
