"""The README's plot of time and memory, from the newest records in ``benchmarks/results/``.

    python benchmarks/plot.py    # needs matplotlib; writes docs/images/time_and_memory.png

``benchmarks/cpu.py --json`` and ``benchmarks/peak_memory.py --json`` append the records.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PLOT = ROOT / "docs" / "images" / "time_and_memory.png"
SHAPE = ("rows", "vocab", "k", "dtype", "threads")
# A bar's label: its names in the records of time and of memory.
BARS = {
    "opd_kernels": ("forward + backward", "ours"),
    "careful PyTorch, compiled": ("careful compiled", "careful compiled"),
    "careful PyTorch": ("careful eager", "careful eager"),
    "full softmaxes, compiled": ("naive compiled", "naive compiled"),
    "full softmaxes": ("naive eager", "naive eager"),
}
OURS, THEIRS = "#1b7f5c", "#9aa5b1"


def newest(name: str) -> dict[str, Any]:
    """The last record of a result file."""
    return json.loads((RESULTS / name).read_text().splitlines()[-1])


def draw(path: Path, time: dict[str, Any], memory: dict[str, Any]) -> None:
    """Two panels of bars with their values."""
    if any(time[name] != memory[name] for name in SHAPE):
        raise SystemExit("the newest records of time and of memory are of different shapes")
    panels = (
        ("Time, ms", [time["milliseconds"][name] for name, _ in BARS.values()], ""),
        (
            "Peak memory, MB",
            [memory["peak_bytes"][name] / 1e6 for _, name in BARS.values()],
            ", the gradient itself",
        ),
    )
    labels = list(BARS)[::-1]
    colors = [OURS if label == "opd_kernels" else THEIRS for label in labels]
    figure, axes = plt.subplots(1, 2, sharey=True, figsize=(9, 2.7), layout="constrained")
    for ax, (title, values, remark) in zip(axes, panels, strict=True):
        bars = ax.barh(labels, values[::-1], color=colors, height=0.66)
        written = [f"{value:.3g}  ({value / values[0]:.3g} x)" for value in values]
        written[0] = f"{values[0]:.3g}{remark}"
        ax.bar_label(bars, written[::-1], padding=4, fontsize=10)
        ax.set_title(title, fontsize=11, loc="left")
        ax.set_xlim(0, max(values) * 1.3)
        ax.spines[["top", "right", "bottom"]].set_visible(False)
        ax.tick_params(bottom=False, labelbottom=False, left=False, labelsize=10)
    axes[1].axvline(memory["gradient_bytes"] / 1e6, color="black", linewidth=1, linestyle=":")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    draw(PLOT, newest("cpu.jsonl"), newest("memory.jsonl"))
    print(PLOT.relative_to(ROOT))
