"""The results of a part: a JSON file, a table, an archive of logs, up to date after each step."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

from report import goal_line, table

from gpu.runner import FAILED, PASSED, Outcome

SCREEN = 40  # lines that a run prints at its end, at most
LOG_BYTES = 1 << 20  # of the end of each log


class Record:
    """What a part has found so far; a run replaces the files of an earlier one of its part."""

    def __init__(self, part: int, output: Path, logs: Path, head: dict[str, Any]) -> None:
        """Nothing yet."""
        self.part, self.output, self.logs = part, output, logs
        self.head = {"part": part, **head}
        self.outcomes: list[Outcome] = []
        self.dropped_tasks: list[str] = []
        self.rows: list[dict[str, Any]] = []
        self.goals: list[dict[str, Any]] = []
        output.mkdir(parents=True, exist_ok=True)

    def keep(self, outcome: Outcome) -> None:
        """Adds a step's outcome and what it recorded."""
        self.outcomes.append(outcome)
        found = outcome.record or {}
        self.head |= found.get("head", {})
        self.rows += found.get("rows", [])
        self.goals += found.get("goals", [])
        self.dropped_tasks += found.get("not_reached", [])
        self.write()

    def write(self) -> None:
        """Replaces the files, each in one step."""
        content = {
            **self.head,
            "steps": [outcome.content() for outcome in self.outcomes],
            "goals": self.goals,
            "not_reached": self.dropped_tasks,
            "rows": self.rows,
        }
        name = f"part-{self.part}"
        self._replace(f"{name}.json", json.dumps(content, indent=1) + "\n")
        lines = [", ".join(f"{key} {value}" for key, value in self.head.items())]
        lines += table(self.rows)
        lines += ["", *self.verdict(), "", *map(step_line, self.outcomes)]
        self._replace(f"{name}.txt", "\n".join(lines) + "\n")
        partial = self.output / f"{name}-logs.partial"
        with tarfile.open(partial, "w:gz") as archive:
            for log in sorted(self.logs.glob("*.log")) + sorted(self.logs.glob("fuzz_failure_*")):
                add_end(archive, log)
        partial.replace(self.output / f"{name}-logs.tar.gz")

    def _replace(self, name: str, text: str) -> None:
        partial = self.output / f"{name}.partial"
        partial.write_text(text)
        partial.replace(self.output / name)

    def verdict(self) -> list[str]:
        """A line for each goal, those that were missed first."""
        return [goal_line(goal) for goal in sorted(self.goals, key=lambda goal: goal["met"])]

    def screen(self) -> list[str]:
        """What is printed at the end: what did not pass, goals, and one line of counts."""
        bad = [step_line(outcome) for outcome in self.outcomes if outcome.state != PASSED]
        lines = [*bad, *self.verdict()]
        room = SCREEN - 2
        if len(lines) > room:
            lines = [*lines[: room - 1], f"... and {len(lines) - room + 1} more lines in the table"]
        states = [outcome.state for outcome in self.outcomes]
        counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
        met = sum(goal["met"] for goal in self.goals)
        return [
            *lines,
            f"files: {self.output}/part-{self.part}{{.json,.txt,-logs.tar.gz}}",
            f"part {self.part}: {counts}; {met} of {len(self.goals)} goals met",
        ]

    @property
    def failed(self) -> bool:
        """Whether a step did; a goal that is missed is no failure."""
        return any(outcome.state == FAILED for outcome in self.outcomes)


def step_line(outcome: Outcome) -> str:
    """How a step ended, on a line."""
    why = "; ".join(part for part in (outcome.summary, outcome.reason) if part)
    return f"{outcome.state:14}{outcome.step.name:30}{outcome.seconds:5.0f} s  {why}"[:200]


def add_end(archive: tarfile.TarFile, log: Path) -> None:
    """Adds the end of a log."""
    with log.open("rb") as file:
        file.seek(0, 2)
        size = min(file.tell(), LOG_BYTES)
        file.seek(-size, 2)
        member = tarfile.TarInfo(log.name)
        member.size = size
        archive.addfile(member, file)
