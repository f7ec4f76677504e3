"""The pictures of a comparison and of a study, as PNG files."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from metawrap.training.checkpoints import write_atomically
from metawrap.training.progress import say
from metawrap.training.tables import task_name

# Eight colours that people with colour blindness tell apart; more lines repeat them with other dashes.
_COLOURS = ("#3b73b9", "#d9772e", "#2a9d7f", "#8a4fbf", "#c2497a", "#8c6d31", "#5a9bd4", "#6b7280")
_DASHES = ("-", "--", ":", "-.")
_MARKERS = ("o", "s", "^", "D")
_TICKS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.97, 0.98, 0.99)


def draw_comparison(rows: Sequence[Mapping[str, Any]], path: Path) -> bool:
    """Draws validation accuracy against seconds of training, one line per method. Returns whether it was drawn."""
    done = [row for row in rows if row["error"] is None and row["accuracy"] is not None]

    def draw(axes: Any) -> float:
        from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

        for index, row in enumerate(sorted(done, key=lambda row: -row["accuracy"])):
            style = index // len(_COLOURS) % len(_DASHES)
            seconds, accuracy = zip(*row["validation"], strict=True)
            axes.plot(
                seconds,
                [min(max(value, 0.01), 0.999) for value in accuracy],  # The axis ends before 0 and 1.
                color=_COLOURS[index % len(_COLOURS)],
                linestyle=_DASHES[style],
                marker=_MARKERS[style],
                markersize=3.5,
                linewidth=1.6,
                label=f"{row['name']}  {100 * row['accuracy']:.1f} %",
            )
        axes.set(xscale="log", xlabel="seconds of training, with validation")
        axes.set_yscale("logit")  # From 97 to 98 % is as far as from 50 to 60 %: each takes away as much of the errors.
        axes.yaxis.set_major_locator(FixedLocator(_TICKS))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}"))
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_minor_locator(NullLocator())
        return 1 / float(done[0]["settings"]["ways"])

    return _draw({"": draw}, path, task_name(done[0]["settings"]) if done else None, legend="test accuracy")


def draw_study(runs: Sequence[Mapping[str, Any]], path: Path) -> bool:
    """Draws validation accuracy by meta-step, a colour per experiment, dashes per seed. Returns whether it was drawn.

    A second panel has the accuracy of targets that are predicted one at a time, where the runs have measured it.
    """
    drawn = [run for run in runs if run["validation"] and None not in run["validation"]]
    experiments = list(dict.fromkeys(run["experiment"] for run in drawn))
    seeds = list(dict.fromkeys(run["seed"] for run in drawn))

    def draw(axes: Any, values: str) -> float:
        for run in drawn:
            percent = [100 * value for value in run[values]]
            colour = _COLOURS[experiments.index(run["experiment"]) % len(_COLOURS)]
            axes.plot(
                run["meta_steps"],
                percent,
                color=colour,
                linestyle=_DASHES[seeds.index(run["seed"]) % len(_DASHES)],
                linewidth=1.6,
                marker="o" if len(percent) == 1 else None,
                label=run["method"]
                + (f", seed {run['seed']}" if len(seeds) > 1 else "")
                + (" (stopped)" if run["error"] else ""),
            )
            if run["error"]:
                axes.plot(run["meta_steps"][-1], percent[-1], color=colour, marker="X", markersize=9, clip_on=False)
        axes.set(xlabel="meta-steps", ylim=(0, 101), xlim=(0, 1.02 * max(run["planned"] for run in drawn)))
        return 100 / float(drawn[0]["ways"])

    panels = {"": partial(draw, values="validation")}
    if drawn and all(run.get("alone") for run in drawn):
        panels = {"all targets of a task in one batch": panels[""], "each target alone": partial(draw, values="alone")}
    return _draw(panels, path, task_name(dict(drawn[0])) if drawn else None)


def _draw(
    panels: Mapping[str, Callable[[Any], float]], path: Path, title: str | None, legend: str | None = None
) -> bool:
    """Draws one figure of panels side by side, by their titles. Each function fills its axes and returns the accuracy
    of chance; without a title nothing is drawn.
    """
    if title is None:
        return False
    try:
        from matplotlib.figure import Figure
    except ImportError:
        say('The plot needs matplotlib: pip install "metawrap[plot]", then run the command again (study: --resume).')
        return False
    figure = Figure(figsize=(9.5, 5.4) if len(panels) == 1 else (12, 5), layout="constrained")
    row = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (name, draw) in zip(row, panels.items(), strict=True):
        chance = draw(axes)
        axes.axhline(chance, color="#9aa0a6", linewidth=1)
        axes.annotate("chance", (1, chance), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8)
        axes.set(title=f"{title}\n{name}" if name else title)
        axes.grid(color="#e3e6ea", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
    row[0].set_ylabel("validation accuracy, %")
    figure.legend(
        *row[0].get_legend_handles_labels(), title=legend, loc="outside right upper", frameon=False, fontsize=9
    )
    save_figure(figure, path, dpi=150)
    return True


def save_figure(figure: Any, path: Path, dpi: int) -> None:
    """Writes a PNG with `write_atomically`."""
    content = io.BytesIO()
    figure.savefig(content, dpi=dpi, facecolor="white", format="png")
    write_atomically(path, lambda handle: handle.write(content.getvalue()))
