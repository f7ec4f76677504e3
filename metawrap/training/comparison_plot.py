"""The picture of a comparison: validation accuracy against seconds of training, a line for each method."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from metawrap.training.progress import say

# Told apart by people who do not see all colours: eight tones, then the same with other dashes.
_COLOURS = ("#3b73b9", "#d9772e", "#2a9d7f", "#8a4fbf", "#c2497a", "#8c6d31", "#5a9bd4", "#6b7280")
_DASHES = ("-", "--", ":")
_MARKERS = ("o", "s", "^")


def draw_comparison(rows: Sequence[dict[str, Any]], path: Path) -> bool:
    """Writes the figure as PNG; says so and returns False where matplotlib is missing or there is nothing to draw."""
    drawn = [row for row in rows if row["error"] is None]
    if not drawn:
        return False
    try:
        from matplotlib.figure import Figure
    except ImportError:
        say('The plot needs matplotlib: pip install "metawrap[plot]", then run the same command again.')
        return False
    figure = Figure(figsize=(9.5, 5.6), layout="constrained")
    axes = figure.subplots()
    for index, row in enumerate(sorted(drawn, key=lambda row: -row["accuracy"])):
        style = index // len(_COLOURS) % len(_DASHES)
        seconds, accuracy = zip(*row["validation"], strict=True)
        axes.plot(
            seconds,
            [100 * value for value in accuracy],
            color=_COLOURS[index % len(_COLOURS)],
            linestyle=_DASHES[style],
            marker=_MARKERS[style],
            markersize=3.5,
            linewidth=1.6,
            label=f"{row['name']}  {100 * row['accuracy']:.1f} %",
        )
    ways = drawn[0]["settings"]["ways"]
    axes.axhline(100 / ways, color="#9aa0a6", linewidth=1)
    axes.annotate("chance", (1, 100 / ways), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8)
    axes.set(
        xscale="log",
        xlabel="seconds of training, with validation",
        ylabel="validation accuracy, %",
        title=_title(drawn),
    )
    axes.grid(color="#e3e6ea", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(title="test accuracy", loc="outside right upper", frameon=False, fontsize=9)
    figure.savefig(path, dpi=150, facecolor="white")
    return True


def _title(rows: Sequence[dict[str, Any]]) -> str:
    settings = rows[0]["settings"]
    return f"{settings['data']}, {settings['ways']}-way {settings['shots']}-shot"
