"""The result file of a benchmark, and the table that is printed of it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch


class Result:
    """The result file and what goes into it."""

    def __init__(self, path: Path | None, head: dict[str, object]) -> None:  # noqa: D107
        self.path, self.head = path, head
        self.rows: list[dict[str, Any]] = []
        self.goals: list[dict[str, Any]] = []
        self.not_reached: list[str] = []

    def add(self, part: str, point: Any, measure: str, **more: object) -> None:
        """A row of the table."""
        self.rows.append({"part": part, "measure": measure, **asdict(point), **more})

    def goal(self, what: str, value: float, *, least: float = 0, most: float = torch.inf) -> None:
        """A figure beside what it should be."""
        goal = f"at least {least:g}" if least else f"at most {most:g}"
        met = least <= value <= most
        self.goals.append({"what": what, "value": value, "goal": goal, "met": met})

    def content(self) -> dict[str, Any]:
        """All of it, flat."""
        return {**self.head, **self.found()}

    def found(self) -> dict[str, Any]:
        """All but the head."""
        return {
            "goals": self.goals,
            "not_reached": self.not_reached,
            "rows": self.rows,
        }

    def write(self) -> None:
        """Replaces the file, if there is to be one, in one step."""
        if self.path is None:
            return
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps({"head": self.head, **self.found()}, indent=1) + "\n")
        partial.replace(self.path)


def comment(row: dict[str, Any]) -> str:
    """What the table says about a row besides time and bytes."""
    said = [row["content"]] if "content" in row else []
    for name, value in row.items():
        if name.startswith("percent_of_"):
            yardsticks = name.removeprefix("percent_of_").replace("_and_", " + ")
            said.append(f"{value:.1f} % of {yardsticks}")
    if "ratio_to_random" in row:
        said.append(f"{row['ratio_to_random']:.2f} x random")
    if "host_us" in row:
        said.append(f"{row['host_us']:.1f} us on the host")
    if "times_ours" in row:
        said.append(f"{row['times_ours']:.2f} x {row.get('beside', row['backend'])}")
    if "times_product" in row:
        least, most = row["predicted_percent"]
        said.append(f"{row['times_product']:.3f} x the product")
        said.append(f"predicted {1 + least / 100:g} to {1 + most / 100:g}")
    if "extra_bytes" in row:
        said.append(f"{row['extra_bytes'] / 1e6:.1f} MB besides gradients")
    if row.get("scaled", 1) > 1:
        said.append(f"{row['scaled']} x the time of 1/{row['scaled']} of the rows")
    if "launches" in row:
        names = row["launches"]
        said.append("not seen" if names is None else f"{len(names)}: {', '.join(names)}"[:300])
    if "counters" in row:
        said.append(counted(row["counters"]))
    said += [row["note"]] if "note" in row else []
    if "error" in row:
        said.append(row["error"].splitlines()[0][:120])
    return ", ".join(said)


def counted(counts: dict[str, Any]) -> str:
    """What a profiler counted in a kernel, on a line."""
    formats = {
        "ns": lambda ns: f"{ns / 1e3:.1f} us",
        "dram_percent": lambda percent: f"{percent:.1f} % of the memory's peak",
        "read_bytes": lambda count: f"{count / 1e6:.1f} MB read",
        "teachers_read": lambda ratio: f"{ratio:.3f} x the teacher's bytes",
        "written_bytes": lambda count: f"{count / 1e6:.1f} MB written",
        "warps_percent": lambda percent: f"{percent:.1f} % of the warps",
        "instructions": lambda count: f"{count / 1e6:.2f} M instructions",
        "issue_percent": lambda percent: f"{percent:.1f} % of what can issue",
        "registers": lambda count: f"{count:.0f} registers",
        "shared_bytes": lambda count: f"{count / 1e3:.1f} kB shared",
        "grid": lambda grid: f"grid {grid}",
        "block": lambda block: f"block {block}",
    }
    said = [form(counts[name]) for name, form in formats.items() if name in counts]
    return ", ".join(said)


def kernel_name(counts: dict[str, Any]) -> str:
    """A kernel's name without its arguments."""
    return str(counts["kernel"]).removeprefix("void ").split("(")[0][:100]


def table(rows: list[dict[str, Any]]) -> list[str]:
    """A line for each measurement, under its shape."""
    groups: dict[str, list[str]] = {}
    for row in rows:
        hidden = f" H={row['hidden']}" if "hidden" in row else ""
        point = f"{row['rows']} x {row['vocab']} {row['dtype']}{hidden} K={row['k']}"
        line = f"  {row.get('backend', ''):7s} {row['measure']:{34 if hidden else 22}s}"
        if "ms" in row:
            line += f"{row['ms']:9.3f} ms ({row['p10']:.3f} to {row['p90']:.3f})".ljust(34)
        if "gb_s" in row:
            line += f"{row['gb_s']:6.0f} GB/s"
        if row.get("peak_bytes") is not None:
            line += f"{row['peak_bytes'] / 1e6:9.1f} MB"
        groups.setdefault(f"\n{row['part']}, {point}", []).append(f"{line}  {comment(row)}")
    return [line for title, lines in groups.items() for line in [title, *lines]]


def goal_line(goal: dict[str, Any]) -> str:
    """Whether a goal was met, by what."""
    met = "met" if goal["met"] else "missed"
    return f"{met:6s}  {goal['what']}: {goal['value']:.4g} (goal: {goal['goal']})"


def report(result: Result) -> None:
    """Prints the table, then what was aimed at."""
    print("\n" + ", ".join(f"{key} {value}" for key, value in result.head.items()))
    print("\n".join(table(result.rows)))
    print("\nverdict")
    for goal in result.goals:
        print(f"  {goal_line(goal)}")
    for name in result.not_reached:
        print(f"  not reached: {name}")
