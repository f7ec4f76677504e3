"""The picture of a comparison: validation accuracy against seconds of training, a line for each method."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from metawrap.training.progress import say

# Told apart by people who do not see all colours: eight tones, then the same with other dashes.
_COLOURS = ("#3b73b9", "#d9772e", "#2a9d7f", "#8a4fbf", "#c2497a", "#8c6d31", "#5a9bd4", "#6b7280")
_DASHES = ("-", "--", ":")
_TICKS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.97, 0.98, 0.99)
_MARKERS = ("o", "s", "^")


def draw_comparison(rows: Sequence[dict[str, Any]], path: Path) -> bool:
    """Writes the figure as PNG; says so and returns False where matplotlib is missing or there is nothing to draw."""
    drawn = [row for row in rows if row["error"] is None]
    if not drawn:
        return False
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator
    except ImportError:
        say('The plot needs matplotlib: pip install "metawrap[plot]", then run the same command again.')
        return False
    figure = Figure(figsize=(9.5, 5.6), layout="constrained")
    axes = figure.subplots()
    axes.set_xscale("log")
    for index, row in enumerate(sorted(drawn, key=lambda row: -row["accuracy"])):
        style = index // len(_COLOURS) % len(_DASHES)
        seconds, accuracy = zip(*row["validation"], strict=True)
        axes.plot(
            seconds,
            [_shown(value) for value in accuracy],
            color=_COLOURS[index % len(_COLOURS)],
            linestyle=_DASHES[style],
            marker=_MARKERS[style],
            markersize=3.5,
            linewidth=1.6,
            label=f"{row['name']}  {100 * row['accuracy']:.1f} %",
        )
    chance = 1 / drawn[0]["settings"]["ways"]
    axes.axhline(chance, color="#9aa0a6", linewidth=1)
    axes.annotate("chance", (1, chance), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8)
    # Log-odds: between 97 and 98 % lies as much of the errors as between 50 and 60 %.
    axes.set_yscale("logit")
    axes.yaxis.set_major_locator(FixedLocator(_TICKS))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set(
        xlabel="seconds of training, with validation",
        ylabel="validation accuracy, %",
        title=_title(drawn),
    )
    axes.grid(color="#e3e6ea", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(title="test accuracy", loc="outside right upper", frameon=False, fontsize=9)
    figure.savefig(path, dpi=150, facecolor="white")
    return True


def _shown(accuracy: float) -> float:
    return min(max(accuracy, 0.01), 0.999)  # 0 and 1 are infinitely far away.


def _title(rows: Sequence[dict[str, Any]]) -> str:
    settings = rows[0]["settings"]
    return f"{settings['data']}, {settings['ways']}-way {settings['shots']}-shot"
