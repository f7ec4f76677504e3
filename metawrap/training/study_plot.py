"""The picture of a study: validation accuracy over the epochs, a colour for each experiment, a line for each seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from metawrap.training.progress import say

# As in a comparison's plot: told apart by people who do not see all colours; seeds by their dashes.
_COLOURS = ("#d9772e", "#3b73b9", "#2a9d7f", "#8a4fbf", "#c2497a", "#8c6d31", "#5a9bd4", "#6b7280")
_DASHES = ("-", "--", ":", "-.")


def draw_study(runs: Sequence[Mapping[str, Any]], path: Path) -> bool:
    """Writes the figure as PNG; says so and returns False where matplotlib is missing or there is nothing to draw."""
    drawn = [run for run in runs if run["validation"]]
    if not drawn:
        return False
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError:
        say('The plot needs matplotlib: pip install "metawrap[plot]", then run the same command again with --resume.')
        return False
    figure = Figure(figsize=(9.5, 5.2), layout="constrained")
    axes = figure.subplots()
    experiments = list(dict.fromkeys(run["experiment"] for run in drawn))
    seeds = list(dict.fromkeys(run["seed"] for run in drawn))
    for run in drawn:
        epochs = range(1, len(run["validation"]) + 1)
        percent = [100 * value for value in run["validation"]]
        colour = _COLOURS[experiments.index(run["experiment"]) % len(_COLOURS)]
        dashes = _DASHES[seeds.index(run["seed"]) % len(_DASHES)]
        point = "o" if len(percent) == 1 else None
        label = f"{run['method']}, seed {run['seed']}" + (" (stopped)" if run["error"] else "")
        axes.plot(epochs, percent, color=colour, linestyle=dashes, linewidth=1.6, marker=point, label=label)
        if run["error"]:
            axes.plot(epochs[-1], percent[-1], color=colour, marker="X", markersize=9, clip_on=False)
    chance = 100 / drawn[0]["ways"]
    axes.axhline(chance, color="#9aa0a6", linewidth=1)
    axes.annotate("chance", (1, chance), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8)
    axes.set(xlabel="epoch", ylabel="validation accuracy, %", title=_title(drawn[0]), ylim=(0, 101))
    axes.set_xlim(0.5, max(max(run["epochs"] for run in drawn), 1) + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(color="#e3e6ea", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", frameon=False, fontsize=9)
    figure.savefig(path, dpi=150, facecolor="white")
    return True


def _title(run: Mapping[str, Any]) -> str:
    return f"{run['data']}, {run['ways']}-way {run['shots']}-shot"
