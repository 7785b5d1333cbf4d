"""The CSV files: one line set a run, appended when it is done. They alone say what is done."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from choosing.plan import KEY, key_of

Row = dict[str, str]
# In the order in which they are written: a run counts as done once it stands in the last.
COLUMNS: dict[str, tuple[str, ...]] = {
    "steps": (
        *("step", "loss", "grad_norm", "clipped", "grad_variance", "tokens", "success"),
        *("student_mass", "teacher_mass", "reverse_kl", "forward_kl", "teacher_score", "gap"),
        *("drift_lsm", "drift_bucket"),
    ),
    "curve": ("step", "tune_success", "tune_mass"),
    "probes": (
        *("step", "objective", "drift", "norm", "signal", "token_variance", "student_mass"),
        *("outside_fillers", "outside_words", "outside_markup", "outside_unused"),
    ),
    "positions": ("position", "gap", "tokens"),
    "runs": (
        *("planned", "steps", "core_seconds", "tune_before", "tune_score", "start_mass"),
        *("clipped", "grad_norm", "tokens", "judge_success", "judge_success_top_p"),
        *("judge_success_greedy", "judge_reverse_kl", "judge_forward_kl", "judge_teacher_score"),
        *("judge_student_mass", "judge_teacher_mass", "judge_length"),
    ),
}


class Records:
    """A folder of CSV files."""

    def __init__(self, folder: Path) -> None:
        """The folder need not exist yet."""
        self.folder = folder

    def begin(self) -> None:
        """Make the files, or go on: lines of a run that was stopped while it was written go."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in COLUMNS:
            whole, path = self.read(name), self.path(name)
            ends = path.exists() and path.read_text().endswith("\n")
            if not ends or len(whole) < len(self._all(name)):
                self._write(name, whole)

    def path(self, name: str) -> Path:
        """Of one file."""
        return self.folder / f"{name}.csv"

    def read(self, name: str) -> list[Row]:
        """The lines of one file that are of runs that are done."""
        done = {key_of(row) for row in self._all("runs")}
        return [row for row in self._all(name) if key_of(row) in done]

    def _all(self, name: str) -> list[Row]:
        """All lines; a last one that was cut off is none."""
        if not self.path(name).exists():
            return []
        text = self.path(name).read_text()
        return list(csv.DictReader(text[: text.rfind("\n") + 1].splitlines()))

    def add(self, key: Sequence[str], tables: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
        """Append all lines of a run."""
        for name in COLUMNS:
            with self.path(name).open("a", newline="") as file:
                self._lines(file, name).writerows(_rows(key, tables[name]))

    def take(self, path: Path) -> None:
        """Append what a run has left in a file, unless it stands here, and delete the file."""
        result = json.loads(path.read_text())
        if tuple(result["key"]) not in {key_of(row) for row in self.read("runs")}:
            self.add(result["key"], result["tables"])
        path.unlink()

    def _write(self, name: str, rows: Iterable[Row]) -> None:
        partial = self.path(name).with_suffix(".partial")
        with partial.open("w", newline="") as file:
            writer = self._lines(file, name)
            writer.writeheader()
            writer.writerows(rows)
        partial.replace(self.path(name))

    def _lines(self, file: Any, name: str) -> csv.DictWriter[str]:
        return csv.DictWriter(file, [*KEY, *COLUMNS[name]], lineterminator="\n")


def write(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """A CSV file of its own, whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: _short(value) for name, value in row.items()} for row in rows)


def _rows(key: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    named = dict(zip(KEY, key, strict=True))
    return [{**named, **{name: _short(value) for name, value in row.items()}} for row in rows]


def _short(value: Any) -> Any:
    return float(f"{value:.5g}") if isinstance(value, float) else value
