"""The main figures as PNG. Matplotlib draws the charts of the page, so both show the same numbers."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from metawrap.errors import MetaWrapError, writing
from metawrap.report.charts import GREY, SYMBOLS, ChartPanel, State, Trace, accuracy_by_step, curves, step_losses
from metawrap.report.class_charts import by_class, embeddings
from metawrap.report.gather import Group
from metawrap.report.layer_charts import learned_rates, norm_statistics, shortened
from metawrap.report.records import Example, Number
from metawrap.training.plots import save_figure

# What plotly calls them, and what matplotlib calls them.
_MARKERS = dict(zip(SYMBOLS, "osD^X*Pv", strict=True))
_DASHES = {"solid": "-", "dash": "--", "dot": ":", "dashdot": "-."}
_MOST_ROWS, _MOST_COLUMNS = 20, 40  # classes and images of an episode
_RIGHT, _WRONG = "#1f8a5b", "#c8452f"


def draw_report_pictures(groups: Sequence[Group], folder: Path) -> list[Path]:
    """Writes report-curves.png, -classes, -embedding, -rates, -steps, -msl, -norms, -episode, as runs have records.

    >>> draw_report_pictures(gather([Path("runs/one")]), Path("pictures"))  # doctest: +SKIP

    Returns:
        The files that were written.
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
    panels: dict[str, Callable[[Sequence[Group]], ChartPanel | None]] = {
        "curves": curves,
        "classes": by_class,
        "embedding": embeddings,
        "rates": learned_rates,
        "steps": accuracy_by_step,
        "msl": step_losses,
        "norms": norm_statistics,
    }
    written = []
    with writing("png", folder, "Name a folder of yours."):
        folder.mkdir(parents=True, exist_ok=True)
        for name in (*panels, "episode"):
            figure = Figure(layout="constrained")
            if name == "episode":
                is_drawn = _draw_episode(figure, groups)
            elif is_drawn := (panel := panels[name](groups)) is not None:
                _draw_panel(figure, panel)
            if is_drawn:
                save_figure(figure, path := folder / f"report-{name}.png", dpi=130)
                written.append(path)
    return written


def _draw_panel(figure: Any, panel: ChartPanel) -> None:
    """Draws the panel's first choice, at the last epoch that all lines of the first chart have."""
    count = len(panel.charts)
    rows, columns = -(-count // 2), min(count, 2)
    tall = max(chart.states[0].layout["height"] for chart in panel.charts) / 90
    figure.set_size_inches(9.5 if columns == 2 else 6.8, max(4.4, tall) if rows == 1 else 3.2 * rows)
    place = _common_place(panel.charts[0].states[0])
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes, chart in zip(grid.flat, panel.charts, strict=False):
        state = chart.states[0]
        _draw_chart(axes, state, state.slides[place] if state.slides else [{}] * len(state.data))
        axes.set_title(chart.title, fontsize=10)
    for axes in grid.flat[count:]:
        axes.set_axis_off()
    for mark, name in panel.key:
        axes.plot([], [], _MARKERS[mark], color=GREY, label=name)
    epoch = f"after epoch {panel.slides[0][place]}" if any(panel.slides) else ""
    title = ", ".join(filter(None, [*panel.choices[:1], epoch]))
    figure.suptitle(_literal(": ".join(filter(None, [title, panel.caption]))), fontsize=10)
    entries: dict[str, Any] = {}
    for axes in figure.axes:
        handles, labels = axes.get_legend_handles_labels()
        entries |= dict(zip(labels, handles, strict=True))
    if entries:
        names = [name if len(name) <= 40 else f"{name[:19]}…{name[-20:]}" for name in entries]
        # In inches of font size 8: 14 letters take one, and so do two markers, each with the space beside its column.
        columns = int(14 * figure.get_figwidth() / (max(map(len, names)) + 7))
        style = {"loc": "outside lower center", "ncols": max(1, min(5, columns)), "frameon": False, "fontsize": 8}
        figure.legend(entries.values(), names, **style)


def _common_place(state: State) -> int:
    """The place of the slider at which most lines have values; the last one, if several places have as many lines."""
    drawn = [sum(any(v is not None for v in trace["y"]) for trace in slide if "y" in trace) for slide in state.slides]
    return max(range(len(drawn)), key=lambda place: (drawn[place], place)) if drawn else -1


def _draw_chart(axes: Any, state: State, slide: Sequence[Trace]) -> None:
    below = [0.0] * max((len(trace.get("x", ())) for trace in state.data), default=0)
    for trace in (trace | change for trace, change in zip(state.data, slide, strict=True)):
        if trace["type"] == "heatmap":
            _draw_table(axes, trace)
            continue
        x, y = _numbers(trace["x"]), _numbers(trace["y"])
        if trace["type"] == "bar":
            for place, text in zip(y, trace["text"], strict=True):
                axes.text(1, place, text, transform=axes.get_yaxis_transform(), ha="right", va="center", fontsize=6)
            axes.barh(y, x, height=0.75, color=trace["marker"]["color"])
            axes.margins(y=0.01)
        elif "stackgroup" in trace:
            top = [low + (0.0 if value is None else value) for low, value in zip(below, trace["y"], strict=True)]
            axes.fill_between(x, below, top, color=trace["fillcolor"], linewidth=0)
            below = top
        elif "fill" in trace:
            axes.fill(x, y, color=trace["fillcolor"], linewidth=0)
        else:
            _draw_line(axes, trace, x, y)
    for name, axis in (("xaxis", axes.xaxis), ("yaxis", axes.yaxis)):
        settings = state.layout[name]
        axis.set_label_text(settings["title"]["text"])
        if "ticktext" in settings:
            names = [_literal(text) for text in settings["ticktext"]]
            turned = {"rotation": 30, "ha": "right"} if name == "xaxis" else {}
            axis.set_ticks(settings["tickvals"], names, fontsize=8 if len(names) < 12 else 6, **turned)
        elif "tickvals" in settings:
            axis.set_ticks(settings["tickvals"])
            axes.set_xlim(*settings["range"])
        elif "dtick" in settings:
            axis.get_major_locator().set_params(integer=True)
        if settings["zeroline"]:
            axes.axhline(0, color=GREY, linestyle="--", linewidth=1.2)
    if "range" in state.layout["yaxis"]:
        axes.set_ylim(*state.layout["yaxis"]["range"])
    if state.layout["yaxis"].get("autorange") == "reversed":
        axes.invert_yaxis()
    if "scaleanchor" in state.layout["yaxis"]:
        axes.set_aspect("equal", "datalim")
    if not any(trace["type"] == "heatmap" for trace in state.data):
        axes.grid(color="#e3e6ea", linewidth=0.8)
        axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_table(axes: Any, trace: Trace) -> None:
    places = range(len(trace["z"]))
    axes.pcolormesh(places, places, trace["z"], cmap="Blues", vmin=0, vmax=130, edgecolor="white", shading="nearest")
    for y, row in enumerate(trace["text"]):
        for x, text in enumerate(row if trace["texttemplate"] else ()):
            axes.text(x, y, text, ha="center", va="center", fontsize=7)


def _draw_line(axes: Any, trace: Trace, x: list[float], y: list[float]) -> None:
    has_line, has_marks = "lines" in trace["mode"], "markers" in trace["mode"]
    style = {
        "color": trace["line"]["color"],
        "linestyle": _DASHES[trace["line"].get("dash", "solid")] if has_line else "none",
        "linewidth": 0.9 * trace["line"]["width"],
        "marker": _MARKERS[trace.get("marker", {}).get("symbol", "circle")] if has_marks else None,
        "markersize": 0.62 * trace.get("marker", {}).get("size", 5),
        "alpha": trace.get("opacity", 1),
        "label": _literal(trace["name"]) if trace.get("showlegend", True) else None,
    }
    if "error_y" not in trace:
        axes.plot(x, y, **style)
        return
    up = trace["error_y"]["array"]
    down = trace["error_y"].get("arrayminus", up)
    bars = [[value or 0.0 for value in each] for each in (down, up)]
    axes.errorbar(x, y, bars, elinewidth=1.2, capsize=trace["error_y"]["width"], **style)


def _numbers(values: Sequence[Number]) -> list[float]:
    return [float("nan") if value is None else value for value in values]


def _draw_episode(figure: Any, groups: Sequence[Group]) -> bool:
    """Draws the last episode of the first run that has one, a row for each class; False if no image was kept."""
    found = [(group.run_label(run), run.episodes[-1]) for group in groups for run in group.runs if run.episodes]
    if not found:
        return False
    label, episode = found[0]
    examples = [
        [each for each in (*episode.support, *episode.target) if each.label == row and each.png]
        for row in range(min(len(episode.classes), _MOST_ROWS))
    ]
    rows, columns = len(examples), min(_MOST_COLUMNS, max(map(len, examples), default=0))
    if not columns:
        return False
    figure.set_size_inches(min(12, 2.6 + 0.95 * columns), min(14, 0.7 + 0.95 * rows))
    grid = figure.subplots(rows, columns, squeeze=False)
    for row, name in enumerate(episode.classes[:rows]):
        for axes, example in zip(grid[row], examples[row], strict=False):
            _draw_example(axes, example)
        text = f"{row}  {_literal(shortened(name, 24))}"
        grid[row][0].set_ylabel(text, rotation=0, ha="right", va="center", fontsize=8)
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
        if not axes.images:
            axes.spines[:].set_visible(False)
    figure.suptitle(_literal(f"{label}:\ntest task {episode.task}, {episode.why}"), fontsize=9)
    return True


def _draw_example(axes: Any, example: Example) -> None:
    try:
        image = Image.open(io.BytesIO(example.png or b""), formats=["PNG"])
        axes.imshow(image, cmap="gray" if image.mode == "L" else None, vmin=0, vmax=255)
    except (OSError, UnidentifiedImageError, ValueError, Image.DecompressionBombError):
        axes.text(0.5, 0.5, "?", ha="center", va="center", transform=axes.transAxes)
    is_support, is_right = example.prediction is None, example.prediction == example.label
    title = "support" if is_support else f"taken for {example.prediction}"
    colour = GREY if is_support else _RIGHT if is_right else _WRONG
    axes.set_title(title, fontsize=7, color=colour, pad=2)
    axes.spines[:].set(color=colour, linewidth=0.8 if is_support else 1.8)


def _literal(text: str) -> str:
    """A text that matplotlib shows as written: it reads a formula between two dollar signs."""
    return text.replace("$", r"\$")
