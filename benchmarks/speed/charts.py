"""Draws the records of `compare`: bars of time and memory for each case, and growth curves.

    python benchmarks charts runs/compare

Reads compare.jsonl from the folder; writes compare.png (a column for each case), and growth.png if there are curves.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from rivals.cases import TARGETS

Record = dict[str, Any]
COLOURS = {"plain": "#8a8f98", "peer": "#d99a4e", "metawrap": "#3b73b9"}
LABELS = {"plain": "plain torch", "peer": "other libraries", "metawrap": "metawrap"}
TARGET, INK, FAINT = "#b3261e", "#22262b", "#dfe3e8"
LONGEST_BAR = 2.2  # Longer bars are cut, and labelled with their ratio.
CURVES = {
    "plain": ("#8a8f98", "o"),
    "metawrap default": ("#d9822b", "P"),
    "metawrap functional": ("#3b73b9", "s"),
    "metawrap flat": ("#2a9d7f", "^"),
    "metawrap workers": ("#8a4fbf", "D"),
    "metawrap workers flat": ("#c2497a", "v"),
}
AXES = {"tasks": "tasks per batch", "steps": "inner steps", "width": "filters", "ranks": "ranks that share the tasks"}


def draw(records: Sequence[Record], folder: Path) -> list[Path]:
    """Writes the figures that the records allow; returns their paths."""
    drawn = []
    bars = [record for record in records if "grow" not in record and record["kind"] in ("time", "memory")]
    curves = [record for record in records if "grow" in record and record["kind"] in ("time", "memory")]
    for found, figure, name in ((bars, bars_of, "compare.png"), (curves, curves_of, "growth.png")):
        if found:
            figure(found).savefig(folder / name, dpi=160, facecolor="white")
            drawn.append(folder / name)
    return drawn


def bars_of(records: Sequence[Record]) -> Figure:
    """Times relative to the plain loop above, peak memory below; a column for each case."""
    cases = list(dict.fromkeys(record["case"]["name"] for record in records))
    settings = [s for s in dict.fromkeys(record["setting"] for record in records) if s is not None]
    height = 0.29 * len(settings) + 0.75
    figure = Figure(figsize=(max(2.2 + 2.75 * len(cases), 7.5), 2 * height + 1.3), layout="constrained")
    grid = figure.subplots(2, len(cases), sharey=True, squeeze=False)
    longest = min(max([r["ratio_to_plain"] for r in records if r["kind"] == "time"] + [1.0]) * 1.02, LONGEST_BAR)
    for column, case in enumerate(cases):
        timed, held = (
            {r["setting"]: r for r in records if r["kind"] == kind and r["case"]["name"] == case}
            for kind in ("time", "memory")
        )
        _time_bars(grid[0][column], settings, timed, TARGETS.get(case), case, longest)
        _memory_bars(grid[1][column], settings, held)
    first = records[0]
    handles: list[Any] = [Patch(color=COLOURS[f], label=LABELS[f]) for f in COLOURS]
    handles += [Patch(facecolor="white", edgecolor=INK, hatch="////", label="first order", linewidth=0.6)]
    handles += [Line2D([], [], color=INK, linewidth=1, label="plain = 1")]
    handles += [
        Line2D([], [], color=TARGET, linewidth=1.2, linestyle=(0, (4, 2)), label="target (bold: met by metawrap)")
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=6, frameon=False, fontsize=8)
    title = "One MAML++ meta-step: time against a plain torch loop, and memory"
    figure.suptitle(f"{title}\n{_setup(first)}", x=0.01, ha="left", fontsize=9, color="#5a616a")
    return figure


def _time_bars(
    axes: Axes, settings: Sequence[str], timed: dict[str, Record], target: float | None, case: str, longest: float
) -> None:
    for place, name in enumerate(settings):
        if (record := timed.get(name)) is None:
            axes.text(0.02, place, "not run", va="center", fontsize=7, color="#8a8f98", style="italic")
            continue
        ratio = record["ratio_to_plain"]
        whole = record["median_s"] / ratio
        shown = min(ratio, longest)
        _bar(axes, place, shown, name)
        end = shown
        if ratio <= longest:
            low, end = record["q1_s"] / whole, min(record["q3_s"] / whole, longest)
            axes.plot([low, end], [place, place], color=INK, linewidth=1, solid_capstyle="butt")
        else:
            axes.text(shown - 0.03, place, "≫", va="center", ha="right", fontsize=8, color="white")
        met = target is not None and ratio <= target and _family(name) == "metawrap" and "first-order" not in name
        ground = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}  # The number may cover one of the lines.
        weight = "bold" if met else "normal"
        at = max(shown, end) + 0.03 * longest
        axes.text(at, place, f"{ratio:.2f}", va="center", fontsize=7.5, color=INK, weight=weight, bbox=ground)
    axes.axvline(1, color=INK, linewidth=1)
    if target is not None:
        axes.axvline(target, color=TARGET, linewidth=1.2, linestyle=(0, (4, 2)))
    plain = timed.get("plain")
    seconds = f"\nplain: {plain['median_s']:.3g} s" if plain else ""
    goal = f", target {target:.2f}" if target is not None else ""
    axes.set_title(f"{case}{goal}{seconds}", fontsize=9, loc="left", color=INK)
    axes.set_xlim(0, longest * 1.22)
    axes.set_xlabel("time of a meta-step, plain = 1", fontsize=8)
    _dress(axes, settings)


def _memory_bars(axes: Axes, settings: Sequence[str], held: dict[str, Record]) -> None:
    peaks = {name: record["device_peak_mb"] or record["peak_mb"] for name, record in held.items()}
    longest = max([*peaks.values(), 1.0])
    for place, name in enumerate(settings):
        if name in peaks:
            _bar(axes, place, peaks[name], name)
            text = f"{peaks[name]:,.0f}"
            axes.text(peaks[name] + 0.02 * longest, place, text, va="center", fontsize=7.5, color=INK)
    axes.set_xlim(0, longest * 1.22)
    axes.set_xlabel("peak memory above imports, MB", fontsize=8)
    _dress(axes, settings)


def _bar(axes: Axes, place: int, length: float, name: str) -> None:
    colour = COLOURS[_family(name)]
    if "first-order" in name:
        axes.barh(place, length, height=0.66, facecolor="white", edgecolor=colour, hatch="////", linewidth=0.8)
    else:
        axes.barh(place, length, height=0.66, color=colour)


def _family(name: str) -> str:
    return name.split()[0] if name.split()[0] in COLOURS else "peer"


def _dress(axes: Axes, settings: Sequence[str]) -> None:
    axes.set_yticks(range(len(settings)), settings, fontsize=8)
    axes.set_ylim(len(settings) - 0.4, -0.6)
    axes.tick_params(axis="x", labelsize=7.5)
    axes.tick_params(length=0)
    axes.set_axisbelow(True)
    axes.grid(axis="x", color=FAINT, linewidth=0.7)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(FAINT)


def curves_of(records: Sequence[Record]) -> Figure:
    """Seconds above, peak memory below; a column for each field that grows. Both scales are logarithmic."""
    kinds = list(dict.fromkeys(record["grow"] for record in records))
    figure = Figure(figsize=(1.0 + 3.6 * max(len(kinds), 2), 6.0), layout="constrained")
    grid = figure.subplots(2, len(kinds), sharey="row", sharex="col", squeeze=False)
    for column, kind in enumerate(kinds):
        of_kind = [record for record in records if record["grow"] == kind]
        for row, (measured, key) in enumerate((("time", "median_s"), ("memory", "peak_mb"))):
            _curves(grid[row][column], [r for r in of_kind if r["kind"] == measured], key)
        values = sorted({record["value"] for record in of_kind})
        grid[1][column].set_xlabel(AXES[kind], fontsize=9)
        for axes in grid[:, column]:
            axes.xaxis.set_major_locator(FixedLocator(values))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.set_xlim(values[0] / 1.15, values[-1] * 1.15)
    grid[0][0].set_ylabel("seconds of a meta-step", fontsize=9)
    grid[1][0].set_ylabel("peak memory above imports, MB", fontsize=9)
    names = list(dict.fromkeys(record["setting"] for record in records))
    handles = [Line2D([], [], color=CURVES[n][0], marker=CURVES[n][1], markersize=5, label=n) for n in names]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(names), frameon=False, fontsize=8.5)
    first = records[0]
    title = f"Growth from case {first['case']['name']}: one MAML++ meta-step"
    figure.suptitle(f"{title}\n{_setup(first)}", x=0.01, ha="left", fontsize=9, color="#5a616a")
    return figure


def _curves(axes: Axes, records: Sequence[Record], key: str) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    for name in dict.fromkeys(record["setting"] for record in records):
        # Megabytes are rounded to tenths, and zero has no logarithm.
        own = [record for record in records if record["setting"] == name]
        points = sorted((r["value"], max(r[key], 0.1) if key == "peak_mb" else r[key]) for r in own)
        colour, marker = CURVES[name]
        axes.plot(*zip(*points, strict=True), color=colour, marker=marker, markersize=4.5, linewidth=1.5)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.grid(color=FAINT, linewidth=0.7)
    axes.tick_params(labelsize=8, length=0)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("bottom", "left"):
        axes.spines[side].set_color(FAINT)


def _setup(record: Record) -> str:
    machine = record["machine"]
    return (
        f"{machine['processor'] if machine['device'] == 'cpu' else machine['device']}, {record['threads']} threads, "
        f"torch {machine['torch']}, allocator {record['allocator']}"
    )


def main() -> None:
    """Draws the records of the folder in the first argument."""
    source = Path(sys.argv[1])
    lines = (source / "compare.jsonl").read_text(encoding="utf-8").splitlines()
    for path in draw([json.loads(line) for line in lines], source):
        print(f"wrote {path}")
