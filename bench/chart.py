"""The picture of a peers record: every case a panel of horizontal bars, fastest first."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

COLOURS = {"ldmfast": "#d1495b", "OpenVINO": "#30638e", "torch.compile": "#5b8e7d", "torch": "#8a9ba8",
           "diffusers": "#8a9ba8", "plain": "#c9d1d6"}


def duration(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.2f} s"


def panel(axes: Any, case: str, entry: Mapping[str, Any]) -> None:
    rows = sorted(entry["arms"].items(), key=lambda item: item[1].get("median_s", float("inf")))
    longest = max((row["median_s"] for _, row in rows if "median_s" in row), default=1.0)
    for place, (name, row) in enumerate(rows):
        colour = COLOURS.get(name.split()[0], "#8a9ba8")
        seconds = row.get("median_s", 0.0)
        axes.barh(place, seconds, color=colour, height=0.72)
        text = duration(seconds) if "median_s" in row else f"not available: {row['unavailable'][:48]}"
        if row.get("startup_s", 0) >= 1:
            text += f"  (start-up {row['startup_s']:.0f} s)"
        axes.text(seconds + longest * 0.012, place, text, va="center", fontsize=8,
                  color="#333333" if "median_s" in row else "#999999")
    axes.set_yticks(range(len(rows)), [name for name, _ in rows], fontsize=8)
    for label, (name, _) in zip(axes.get_yticklabels(), rows):
        label.set_fontweight("bold" if name.startswith("ldmfast") else "normal")
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(0, longest * 1.45)
    axes.set_xticks([])
    axes.tick_params(left=False)
    axes.spines[:].set_visible(False)
    axes.set_title(case, fontsize=9, loc="left", fontweight="bold")
    axes.set_title(entry["note"].split(";")[0], fontsize=7, loc="right", color="#777777")


def draw(record: Mapping[str, Any], path: Path) -> Path:
    """Writes the chart of a record of bench/peers.py: networks first, then kernels, in two columns."""
    from matplotlib.figure import Figure

    cases = sorted(record["cases"], key=lambda case: case.startswith(("attention", "group_norm")))
    height = {case: len(record["cases"][case]["arms"]) + 1.6 for case in cases}
    half = sum(height.values()) / 2
    left = [case for i, case in enumerate(cases) if i == 0 or sum(height[c] for c in cases[:i + 1]) <= half]
    columns = [column for column in (left, cases[len(left):]) if column]
    tallest = max(sum(height[case] for case in column) for column in columns)
    figure = Figure(figsize=(6.4 * len(columns), 0.6 + 0.24 * tallest), layout="constrained")
    for part, column in zip(figure.subfigures(1, len(columns), squeeze=False)[0], columns):
        ratios = [height[case] for case in column]
        blank = [tallest - sum(ratios)] if tallest - sum(ratios) > 0.1 else []
        grid = part.subplots(len(column) + len(blank), 1, squeeze=False, height_ratios=ratios + blank)[:, 0]
        for axes, case in zip(grid, column):
            panel(axes, case, record["cases"][case])
        for axes in grid[len(column):]:
            axes.axis("off")
    machine = f"{record['device']}, {record['threads']} threads, instruction set: {record['level']}"
    figure.suptitle(f"{machine}. Median time, shorter is better", fontsize=10)
    figure.savefig(path, dpi=140)
    return path
