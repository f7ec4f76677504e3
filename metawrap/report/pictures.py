"""The main figures as PNG, with matplotlib: the numbers are those of the page."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from metawrap.errors import ArgumentError, MetaWrapError
from metawrap.report.charts import GREY, ramp
from metawrap.report.gather import COLOURS, Group
from metawrap.report.layer_charts import shortened
from metawrap.report.series import (
    KINDS,
    curve,
    epoch_of,
    norm_layers,
    norms_at,
    rate_panels,
    rates_at,
    steps_of,
    with_norms,
    with_rates,
    with_step_losses,
)
from metawrap.training.run_records import Episode, Example, Number

_MARKERS = ("o", "s", "D", "^", "X", "*", "P", "v")
_RIGHT, _WRONG = "#1f8a5b", "#c8452f"


def draw_report_pictures(groups: Sequence[Group], folder: Path) -> list[Path]:
    """Writes report-curves.png, -rates, -steps, -msl, -norms and -episode, those that the runs have records for.

    Returns:
        What was written.
    Raises:
        ArgumentError: the folder cannot be written to.
        MetaWrapError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MetaWrapError(
            f'png: the pictures need matplotlib ({error}): pip install "metawrap[plot]", or leave --png out.'
        ) from error
    drawings: dict[str, Callable[[Figure, Sequence[Group]], bool]] = {
        "curves": _curves,
        "rates": _rates,
        "steps": _steps,
        "msl": _step_losses,
        "norms": _norms,
        "episode": _episode,
    }
    written = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, draw in drawings.items():
            figure = Figure(figsize=(9.5, 4.2), layout="constrained")
            if draw(figure, groups):
                figure.savefig(path := folder / f"report-{name}.png", dpi=130, facecolor="white")
                written.append(path)
    except OSError as error:
        raise ArgumentError(f"png: cannot write in '{folder}' ({error.strerror}). Name a folder of yours.") from error
    return written


def _curves(figure: Any, groups: Sequence[Group]) -> bool:
    if not any(run.epochs for group in groups for run in group.runs):
        return False
    for axes, name in zip(figure.subplots(1, 2), ("accuracy", "loss"), strict=True):
        scale = 100 if name == "accuracy" else 1
        for number, group in enumerate(groups):
            for part, style in (("train", ":"), ("validation", "-")):
                band, colour = curve(group, f"{part}_{name}"), COLOURS[number % len(COLOURS)]
                words = "training" if part == "train" else part
                label = f"{_plain(group.label)}, {words}"
                middle = [scale * value for value in band.middle]
                axes.plot(band.epochs, middle, style, color=colour, marker=".", linewidth=1.8, label=label)
                low, high = (_scaled(each, scale) for each in (band.low, band.high))
                axes.fill_between(band.epochs, low, high, color=colour, alpha=0.16, linewidth=0)
        _style(axes, "epoch", "accuracy, %" if name == "accuracy" else "loss")
    _legend(figure, axes)
    return True


def _rates(figure: Any, groups: Sequence[Group]) -> bool:
    runs = with_rates(groups)
    if not runs:
        return False
    panels = rate_panels([run for _, run in runs])
    most = steps_of([rates.median for _, run in runs for epoch in run.epochs for rates in epoch.rates.values()])
    figure.set_size_inches(9.5, 4.6)
    columns = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, panel in zip(columns, panels, strict=True):
        axes.axhline(0, color=GREY, linestyle="--", linewidth=1.2)
        for number, (label, run) in enumerate(runs):
            last = max(epoch.number for epoch in run.epochs if epoch.rates)
            epoch = epoch_of(run, last)
            assert epoch is not None
            steps = steps_of([rates.median for rates in epoch.rates.values()])
            for step in range(steps):
                colour = ramp(step, steps) if len(runs) == 1 else COLOURS[number % len(COLOURS)]
                axes.plot(
                    _scaled(rates_at(epoch, panel.parameters, step), 1),
                    color=colour,
                    marker=_MARKERS[step % len(_MARKERS)],
                    markersize=4.5,
                    linewidth=1.4,
                    alpha=1 if len(runs) == 1 else 0.45 + 0.55 * (step + 1) / steps,
                    label=f"step {step + 1}" if len(runs) == 1 else None,
                )
            if len(runs) > 1:
                axes.plot([], [], color=COLOURS[number % len(COLOURS)], linewidth=3, label=_plain(label))
        for step in range(most if len(runs) > 1 else 0):
            axes.plot([], [], _MARKERS[step % len(_MARKERS)], color=GREY, label=f"step {step + 1}")
        _layer_ticks(axes, panel.layers)
        _style(axes, "", "inner learning rate", f"{panel.title}, after epoch {last}")
    _legend(figure, axes)
    return True


def _steps(figure: Any, groups: Sequence[Group]) -> bool:
    figure.set_size_inches(6.8, 4.2)
    axes = figure.subplots()
    drawn = [(number, group, run) for number, group in enumerate(groups) for run in group.runs if run.steps]
    for place, (number, group, run) in enumerate(drawn):
        counts = sorted(run.steps)
        shift = 0.05 * (place - (len(drawn) - 1) / 2)
        axes.errorbar(
            [count + shift for count in counts],
            [100 * run.steps[count].accuracy for count in counts],
            [100 * (run.steps[count].interval or 0) for count in counts],
            color=COLOURS[number % len(COLOURS)],
            marker=_MARKERS[group.runs.index(run) % len(_MARKERS)],
            linestyle=("-", "--", ":", "-.")[group.runs.index(run) % 4],
            capsize=2.5,
            linewidth=1.6,
            label=_plain(group.run_label(run)),
        )
    _style(axes, "inner steps taken", "test accuracy, %")
    _legend(figure, axes)
    return bool(drawn)


def _step_losses(figure: Any, groups: Sequence[Group]) -> bool:
    chosen = with_step_losses(groups)
    if not chosen:
        return False
    label, run = chosen[0]
    epochs = [epoch for epoch in run.epochs if epoch.step_weights]
    steps = steps_of([epoch.step_weights for epoch in epochs])
    numbers = [epoch.number for epoch in epochs]
    left, right = figure.subplots(1, 2)
    rows = [[epoch.step_weights[step] or 0.0 for epoch in epochs] for step in range(steps)]
    left.stackplot(numbers, *rows, colors=[ramp(step, steps) for step in range(steps)], alpha=0.75)
    for step in range(steps):
        losses = [epoch.step_losses[step] if step < len(epoch.step_losses) else None for epoch in epochs]
        right.plot(numbers, _scaled(losses, 1), color=ramp(step, steps), marker=".", label=f"step {step + 1}")
    _style(left, "epoch", "weight of each step's loss", _plain(label))
    _style(right, "epoch", "target loss after each step")
    _legend(figure, right)
    return True


def _norms(figure: Any, groups: Sequence[Group]) -> bool:
    runs = with_norms(groups)
    if not runs:
        return False
    label, run = runs[0]
    epoch = [epoch for epoch in run.epochs if epoch.norms][-1]
    layers = norm_layers(run)
    figure.set_size_inches(9.5, 6.4)
    for axes, (part, title) in zip(figure.subplots(2, 2).flat, KINDS.items(), strict=True):
        steps = steps_of([parts[part].median for parts in epoch.norms.values() if part in parts])
        for step in range(steps):
            low, median, high = norms_at(epoch, layers, part, step)
            shift = 0.5 * (step - (steps - 1) / 2) / max(steps, 2)
            marks = [
                (place + shift, m, m - a, b - m)
                for place, (a, m, b) in enumerate(zip(low, median, high, strict=True))
                if a is not None and m is not None and b is not None
            ]
            if marks:
                x, y, down, up = zip(*marks, strict=True)
                style = {"marker": _MARKERS[step % len(_MARKERS)], "markersize": 4.5, "linestyle": "none"}
                axes.errorbar(x, y, (down, up), color=ramp(step, steps), label=f"step {step + 1}", **style)
        _layer_ticks(axes, layers)
        _style(axes, "", "", title)
    figure.suptitle(_plain(f"{label}, epoch {epoch.number}: median and quartiles over channels"), fontsize=10)
    _legend(figure, figure.axes[0])
    return True


def _episode(figure: Any, groups: Sequence[Group]) -> bool:
    found = [(group.run_label(run), run.episodes[-1]) for group in groups for run in group.runs if run.episodes]
    if not found:
        return False
    label, episode = found[0]
    ways = len(episode.classes)
    columns = [_shown(episode, row) for row in range(ways)]
    width = max((len(support) + len(target) for support, target in columns), default=0)
    if not width:
        return False
    figure.set_size_inches(min(12, 2.6 + 0.95 * width), min(14, 0.7 + 0.95 * ways))
    grid = figure.subplots(ways, width, squeeze=False)
    for row, (support, target) in enumerate(columns):
        for axes, example in zip(grid[row], [*support, *target], strict=False):
            _draw_example(axes, example)
        grid[row][0].set_ylabel(
            f"{row}  {_plain(shortened(episode.classes[row], 24))}", rotation=0, ha="right", va="center", fontsize=8
        )
    for axes in grid.flat:
        axes.set_xticks([])
        axes.set_yticks([])
        if not axes.images:
            axes.spines[:].set_visible(False)
    figure.suptitle(_plain(f"{label}: test task {episode.task}, {episode.why}"), fontsize=9)
    return True


def _shown(episode: Episode, label: int) -> tuple[list[Example], list[Example]]:
    support, target = (
        [each for each in part if each.label == label and each.png] for part in (episode.support, episode.target)
    )
    return support, target


def _draw_example(axes: Any, example: Example) -> None:
    try:
        image = Image.open(io.BytesIO(example.png or b""), formats=["PNG"])
        axes.imshow(image, cmap="gray" if image.mode == "L" else None, vmin=0, vmax=255)
    except (OSError, UnidentifiedImageError, ValueError, Image.DecompressionBombError):
        axes.text(0.5, 0.5, "?", ha="center", va="center", transform=axes.transAxes)
    if example.prediction is None:
        axes.set_title("support", fontsize=7, color=GREY, pad=2)
        axes.spines[:].set_color(GREY)
        return
    right = example.prediction == example.label
    axes.set_title(f"taken for {example.prediction}", fontsize=7, color=_RIGHT if right else _WRONG, pad=2)
    axes.spines[:].set_color(_RIGHT if right else _WRONG)
    axes.spines[:].set_linewidth(1.8)


def _style(axes: Any, x: str, y: str, title: str = "") -> None:
    axes.set(xlabel=x, ylabel=y)
    axes.set_title(title, fontsize=10)
    axes.grid(color="#e3e6ea", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)


def _layer_ticks(axes: Any, layers: Sequence[str]) -> None:
    places = range(0, len(layers), -(-len(layers) // 24))
    axes.set_xticks(places, [_plain(shortened(layers[place])) for place in places], rotation=30, ha="right", fontsize=8)


def _legend(figure: Any, axes: Any) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        figure.legend(
            handles, labels, loc="outside lower center", ncols=min(5, len(handles)), frameon=False, fontsize=8
        )


def _scaled(values: Sequence[Number], scale: float) -> list[float]:
    return [float("nan") if value is None else scale * value for value in values]


def _plain(text: str) -> str:
    """A text as matplotlib shows it: between two dollars it would read mathematics, and fail on what is none."""
    return text.replace("$", r"\$")
