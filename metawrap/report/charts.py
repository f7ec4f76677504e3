"""Curves, accuracy by inner step and the multi-step loss as plotly charts.

A chart is plain data in plotly's words. `page.js` draws it in the browser, `pictures.py` draws it with matplotlib.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from html import escape
from typing import Any

from metawrap.report.gather import Group, recorded, shown_runs
from metawrap.report.records import Number

# The colours of inner steps in their order. All can be seen on white and on black.
RAMP = ("#5b4bb7", "#3f78c9", "#2f9c9c", "#6fae4e", "#d0a52c", "#e07b39", "#d1528a")
GREY = "#8a94a3"
# The marks of inner steps: plotly's name and the same mark as a letter.
SYMBOLS = {
    "circle": "●", "square": "■", "diamond": "◆", "triangle-up": "▲", "x": "✖", "star": "★", "cross": "✚",
    "triangle-down": "▼",
}  # fmt: skip
Trace = dict[str, Any]


@dataclass(frozen=True)
class State:
    """A chart under one choice of its panel. slides: for each place of the slider, the changes to each trace."""

    data: list[Trace]
    layout: dict[str, Any]
    slides: list[list[Trace]] = field(default_factory=list)


@dataclass(frozen=True)
class Chart:
    """One plot, with a title above it and one state for each choice of its panel."""

    name: str
    title: str
    states: list[State]


@dataclass(frozen=True)
class ChartPanel:
    """Charts side by side, under one choice and one slider.

    choice: a choice in one word. slides: for each choice, the names of the slider's places. key: marks that no legend
    of a chart explains, as plotly names them, each with its meaning. caption: the meaning of all marks, for a picture.
    """

    charts: list[Chart]
    choices: list[str] = field(default_factory=list)
    slides: list[list[str]] = field(default_factory=list)
    key: list[tuple[str, str]] = field(default_factory=list)
    caption: str = ""
    choice: str = "run"

    def for_plotly(self) -> dict[str, Any]:
        """The panel as JSON values. Texts of charts are escaped, because plotly reads tags in them."""
        content = asdict(self)
        for chart in content["charts"]:
            chart["states"] = _escaped(chart["states"])
        return content


def _escaped(value: Any) -> Any:
    if isinstance(value, dict):
        # Hover templates are metawrap's own. They name a run or a layer only as %{fullData.name} or %{text}.
        return {name: each if name == "hovertemplate" else _escaped(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_escaped(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None  # A difference of numbers near the largest float: JSON has no infinity.
    return escape(value, quote=False) if isinstance(value, str) else value


def ramp(step: int, steps: int) -> str:
    """The colour of an inner step (from 0)."""
    return RAMP[round(step * (len(RAMP) - 1) / max(1, steps - 1))]


def symbol(step: int) -> str:
    """The mark of an inner step (from 0), as plotly names it."""
    return list(SYMBOLS)[step % len(SYMBOLS)]


def faded(colour: str, opacity: float) -> str:
    """A colour of six hex digits, made transparent."""
    return f"{colour}{round(255 * opacity):02x}"


def steps_of(rows: Sequence[Sequence[Number]]) -> int:
    """The largest number of inner steps among rows that have one value for each step."""
    return max((len(row) for row in rows), default=0)


def value_at(row: Sequence[Number], step: int) -> Number:
    """The value of an inner step (from 0); None if the row is shorter."""
    return row[step] if step < len(row) else None


def line(name: str, x: Sequence[Any], y: Sequence[Number], colour: str, hover: str, **more: Any) -> Trace:
    """A line, with a mark at each point if there are few points."""
    return {
        "type": "scatter",
        "x": x,
        "y": y,
        "name": name,
        "mode": "lines+markers" if len(x) < 30 else "lines",
        "line": {"color": colour, "width": 2},
        "marker": {"size": 5},
        "hovertemplate": f"{hover}<extra></extra>",
        **more,
    }


def layout(x: str, y: str, **more: Any) -> dict[str, Any]:
    """The layout that all charts share, with changes; dicts are merged."""
    axis = {"automargin": True, "zeroline": False, "fixedrange": False}
    shared: dict[str, Any] = {
        "height": 340,
        "margin": {"l": 8, "r": 12, "t": 8, "b": 8},
        "hovermode": "closest",
        "legend": {"orientation": "h", "yanchor": "bottom", "y": 1.02, "xanchor": "left", "x": 0},
        "xaxis": {**axis, "title": {"text": x, "standoff": 8}},
        "yaxis": {**axis, "title": {"text": y, "standoff": 8}},
    }
    for name, value in more.items():
        shared[name] = {**shared.get(name, {}), **value} if isinstance(value, dict) else value
    return shared


def whole_ticks(most: int) -> dict[str, Any]:
    """Ticks of an axis of whole numbers up to `most`: at multiples of 1, 2 or 5 times a power of ten, at most ten."""
    distances = (digit * 10**power for power in range(12) for digit in (1, 2, 5))
    return {"tickmode": "linear", "tick0": 0, "dtick": next(each for each in distances if most <= 10 * each)}


def curves(groups: Sequence[Group]) -> ChartPanel | None:
    """Accuracy and loss by epoch; None if no run has an epoch yet."""
    if not any(run.epochs for group in groups for run in group.runs):
        return None
    charts = []
    for name, title in (("accuracy", "Accuracy, %"), ("loss", "Loss")):
        lines = [(group, part) for group in groups for part in ("train", "validation")]
        data = [trace for group, part in lines for trace in _curve(group, part, name, is_alone=len(groups) == 1)]
        most = max(epoch.number for group in groups for run in group.runs for epoch in run.epochs)
        shown = layout("epoch", "", xaxis={"rangemode": "nonnegative", **whole_ticks(most)})
        charts.append(Chart(f"curves-{name}", title, [State(data, shown)]))
    return ChartPanel(charts, caption="" if len(groups) == 1 else "validation (solid) and training (dotted)")


def _curve(group: Group, part: str, name: str, *, is_alone: bool) -> list[Trace]:
    """The mean over seeds in a band of one standard deviation to each side; of several groups, one legend entry each.

    The band of a single run is the 95 % interval of its validation accuracy over tasks.
    """
    key, is_accuracy = f"{part}_{name}", name == "accuracy"
    found: dict[int, list[dict[str, float]]] = {}
    for epoch in (epoch for run in group.runs for epoch in run.epochs if key in epoch.curves):
        found.setdefault(epoch.number, []).append(epoch.curves)
    epochs, middle, band, scale = sorted(found), [], [], 100 if is_accuracy else 1
    for number in epochs:
        values = [each[key] for each in found[number]]
        middle.append(scale * (mean := statistics.fmean(values)))
        if len(group.runs) > 1:
            spread = statistics.stdev(values) if len(values) > 1 else None
        else:
            spread = found[number][0].get("validation_interval") if key == "validation_accuracy" else None
        if spread is not None:
            low, high = mean - spread, mean + spread
            low, high = (max(0.0, low), min(1.0, high)) if is_accuracy else (low, high)
            band.append((number, scale * low, scale * high))
    word = {"train": "training"}.get(part, part)
    label = word if is_alone else group.label
    style = {"width": 2.4, "dash": "solid"} if part == "validation" else {"width": 1.6, "dash": "dot"}
    hover = f"%{{fullData.name}}{'' if is_alone else f', {word}'}<br>epoch %{{x}}: %{{y:.4g}}"
    shown = {"line": {"color": group.colour} | style, "showlegend": is_alone or part == "validation"}
    mean_line = line(label, epochs, middle, group.colour, hover, legendgroup=label, **shown)
    shade = {
        "type": "scatter",
        "x": [number for number, _, _ in band + band[::-1]],
        "y": [high for _, _, high in band] + [low for _, low, _ in reversed(band)],
        "fill": "toself",
        "fillcolor": faded(group.colour, 0.18),
        "line": {"width": 0},
        "mode": "lines",
        "hoverinfo": "skip",
        "showlegend": False,
        "legendgroup": label,
    }
    return [shade, mean_line] if band else [mean_line] if epochs else []


def accuracy_by_step(groups: Sequence[Group]) -> ChartPanel | None:
    """Accuracy on test tasks after each number of inner steps; None if no run recorded it."""
    runs = [shown for shown in shown_runs(groups) if shown.run.steps]
    if not runs:
        return None
    data: list[Trace] = []
    for place, shown in enumerate(runs):
        steps = shown.run.steps
        counts = sorted(steps)
        intervals = [steps[count].interval for count in counts]
        # Runs stand a little apart; otherwise their intervals would cover each other.
        shift = 0.06 * (place - (len(runs) - 1) / 2) if len(runs) < 9 else 0.0
        data.append(
            line(
                shown.label,
                [count + shift for count in counts],
                [100 * steps[count].accuracy for count in counts],
                shown.colour,
                "%{fullData.name}<br>after %{customdata} steps: %{y:.2f} %",
                error_y={
                    "type": "data",
                    "array": [None if each is None else 100 * each for each in intervals],
                    "thickness": 1.2,
                    "width": 3,
                },
                customdata=counts,
                mode="lines+markers",
                line={"color": shown.colour, "width": 2, "dash": shown.dash},
                marker={"size": 7, "symbol": symbol(place)},
            )
        )
    most = max(max(shown.run.steps) for shown in runs)
    # Plotly leaves out a legend of one line.
    axes = layout("inner steps taken", "accuracy, %", height=380, xaxis=whole_ticks(most), showlegend=True)
    ways = [group.settings.get("ways") for group in groups]
    if type(ways[0]) is int and ways[0] > 1 and all(each == ways[0] for each in ways):
        dashed = {"color": GREY, "width": 1, "dash": "dash"}
        hover = "chance: %{y:.3g} %"
        data.append(line("chance", [0, most], [100 / ways[0]] * 2, GREY, hover, mode="lines", line=dashed))
    return ChartPanel([Chart("steps", "Accuracy by inner step", [State(data, axes)])])


def step_losses(groups: Sequence[Group]) -> ChartPanel | None:
    """By epoch, the weight of the target loss after each inner step, and that loss; None if no run recorded them.

    The choices are groups; each shows its first run that has both.
    """
    chosen = []
    for group in groups:
        runs = [run for run in group.runs if recorded(run, "step_losses") and recorded(run, "step_weights")]
        chosen += [(group.label, runs[0])] if runs else []
    if not chosen:
        return None
    weights: list[State] = []
    losses: list[State] = []
    for _, run in chosen:
        epochs = [epoch for epoch in run.epochs if epoch.step_weights]
        steps = steps_of([epoch.step_weights for epoch in epochs])
        numbers = [epoch.number for epoch in epochs]
        for states, name, unit in ((weights, "step_weights", "weight"), (losses, "step_losses", "loss")):
            data: list[Trace] = []
            for step in range(steps):
                y, colour = [value_at(getattr(epoch, name), step) for epoch in epochs], ramp(step, steps)
                hover = f"step {step + 1}, epoch %{{x}}: {unit} %{{y:.4g}}"
                area = {"stackgroup": "weights", "fillcolor": faded(colour, 0.55)} if states is weights else {}
                data.append(line(f"step {step + 1}", numbers, y, colour, hover, **area))
            axes = {"xaxis": whole_ticks(max(numbers)), "yaxis": {"rangemode": "tozero"}}
            states.append(State(data, layout("epoch", "", **axes, legend={"traceorder": "normal"})))
    charts = [Chart("step-weights", "Weight of each step's loss", weights)]
    charts.append(Chart("step-losses", "Target loss after each step", losses))
    return ChartPanel(charts, [label for label, _ in chosen], [[] for _ in chosen])
