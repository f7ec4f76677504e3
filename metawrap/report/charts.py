"""Curves, accuracy by inner step and the multi-step loss, as plotly has them: plain data, drawn in the browser."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

from metawrap.report.gather import COLOURS, Group
from metawrap.report.series import curve, steps_of, with_step_losses
from metawrap.training.run_records import Number

# For what is in order, such as inner steps: from dark to light, but visible on white and on black.
RAMP = ("#5b4bb7", "#3f78c9", "#2f9c9c", "#6fae4e", "#d0a52c", "#e07b39", "#d1528a")
GREY = "#8a94a3"
Trace = dict[str, Any]


@dataclass(frozen=True)
class State:
    """What a chart shows for one choice. slides: for each place of the slider, what differs in each trace."""

    data: list[Trace]
    layout: dict[str, Any]
    slides: list[list[Trace]] = field(default_factory=list)


@dataclass(frozen=True)
class Chart:
    """One plot. title: above it. states: one for each choice of its panel."""

    name: str
    title: str
    states: list[State]


@dataclass(frozen=True)
class ChartPanel:
    """Charts side by side, under one choice and one slider.

    slides: for each choice, the names of the slider's places. key: how many inner steps have a mark of their own that
    no chart explains.
    """

    charts: list[Chart]
    choices: list[str] = field(default_factory=list)
    slides: list[list[str]] = field(default_factory=list)
    key: int = 0


def plain(text: object) -> str:
    """A text as plotly shows it: it reads tags in texts."""
    return escape(str(text), quote=False)


def ramp(place: int, count: int) -> str:
    """The colour of something in order."""
    return RAMP[round(place * (len(RAMP) - 1) / max(1, count - 1))]


def layout(x: str, y: str, **more: Any) -> dict[str, Any]:
    """The layout that all charts share."""
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


def percent(values: Sequence[Number]) -> list[Number]:
    """Fractions as percent."""
    return [None if value is None else 100 * value for value in values]


def curves(groups: Sequence[Group]) -> ChartPanel | None:
    """Accuracy and loss by epoch; None where no run has an epoch yet."""
    if not any(run.epochs for group in groups for run in group.runs):
        return None
    charts = []
    for name, title in (("accuracy", "Accuracy, %"), ("loss", "Loss")):
        data: list[Trace] = []
        for number, group in enumerate(groups):
            for part in ("train", "validation"):
                data += _curve(group, part, name, COLOURS[number % len(COLOURS)])
        shown = layout("epoch", "", xaxis={"rangemode": "nonnegative"}, yaxis={"title": {"text": ""}})
        charts.append(Chart(f"curves-{name}", title, [State(data, shown)]))
    return ChartPanel(charts)


def _curve(group: Group, part: str, name: str, colour: str) -> list[Trace]:
    band, scale = curve(group, f"{part}_{name}"), 100 if name == "accuracy" else 1
    label, is_validation = (
        f"{plain(group.label)}, {'validation' if part == 'validation' else 'training'}",
        part != "train",
    )
    x, y = band.outline()
    shade = {
        "type": "scatter",
        "x": x,
        "y": [scale * value for value in y],
        "fill": "toself",
        "fillcolor": faded(colour, 0.18),
        "line": {"width": 0},
        "mode": "lines",
        "hoverinfo": "skip",
        "showlegend": False,
        "legendgroup": label,
    }
    line = {
        "type": "scatter",
        "x": band.epochs,
        "y": [scale * value for value in band.middle],
        "name": label,
        "legendgroup": label,
        "mode": "lines+markers" if len(band.epochs) < 30 else "lines",
        "line": {"color": colour, "width": 2.4 if is_validation else 1.6, "dash": "solid" if is_validation else "dot"},
        "marker": {"size": 5},
        "hovertemplate": f"{label}<br>epoch %{{x}}: %{{y:.4g}}<extra></extra>",
    }
    return [shade, line] if x else [line] if band.epochs else []


def _chance(most: int, ways: int) -> Trace:
    return {
        "type": "scatter",
        "x": [0, most],
        "y": [100 / ways] * 2,
        "mode": "lines",
        "line": {"color": GREY, "width": 1, "dash": "dash"},
        "name": "chance",
        "hovertemplate": "chance: %{y:.3g} %<extra></extra>",
    }


def _same_ways(groups: Sequence[Group]) -> int | None:
    ways = {str(group.settings.get("ways")) for group in groups}
    found = groups[0].settings.get("ways")
    return found if len(ways) == 1 and isinstance(found, int) and not isinstance(found, bool) and found > 1 else None


def accuracy_by_step(groups: Sequence[Group]) -> ChartPanel | None:
    """Accuracy on test tasks after each number of inner steps; None where no run recorded it."""
    data: list[Trace] = []
    runs = [(number, group, run) for number, group in enumerate(groups) for run in group.runs if run.steps]
    for place, (number, group, run) in enumerate(runs):
        counts = sorted(run.steps)
        scores = [run.steps[count] for count in counts]
        # A little apart, or the intervals of all runs would lie on each other.
        shift = 0.06 * (place - (len(runs) - 1) / 2) if len(runs) < 9 else 0.0
        label, colour = plain(group.run_label(run)), COLOURS[number % len(COLOURS)]
        data.append(
            {
                "type": "scatter",
                "x": [count + shift for count in counts],
                "y": [100 * score.accuracy for score in scores],
                "error_y": {
                    "type": "data",
                    "array": percent([score.interval for score in scores]),
                    "thickness": 1.2,
                    "width": 3,
                },
                "customdata": counts,
                "name": label,
                "mode": "lines+markers",
                "line": {
                    "color": colour,
                    "width": 2,
                    "dash": ("solid", "dash", "dot", "dashdot")[_nth(group, run) % 4],
                },
                "marker": {"size": 7, "symbol": SYMBOLS[_nth(group, run) % len(SYMBOLS)]},
                "hovertemplate": f"{label}<br>after %{{customdata}} steps: %{{y:.2f}} %<extra></extra>",
            }
        )
    if not data:
        return None
    shown, most = layout("inner steps taken", "accuracy, %", height=380), max(max(run.steps) for *_, run in runs)
    if most <= 12:
        shown["xaxis"] |= {"tickmode": "linear", "tick0": 0, "dtick": 1}
    if ways := _same_ways(groups):
        data.append(_chance(most, ways))
    return ChartPanel([Chart("steps", "", [State(data, shown)])])


# In plotly's words, and as letters.
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "star", "cross", "triangle-down")
GLYPHS = "●■◆▲✖★✚▼"


def _nth(group: Group, run: object) -> int:
    return next(place for place, each in enumerate(group.runs) if each is run)


def step_losses(groups: Sequence[Group]) -> ChartPanel | None:
    """The weight of the target loss after each inner step by epoch, and that loss; None where no run has them."""
    chosen = with_step_losses(groups)
    if not chosen:
        return None
    weights: list[State] = []
    losses: list[State] = []
    for _, run in chosen:
        steps = steps_of([epoch.step_weights for epoch in run.epochs])
        epochs = [epoch for epoch in run.epochs if epoch.step_weights]
        for states, name, unit in ((weights, "step_weights", "weight"), (losses, "step_losses", "loss")):
            data: list[Trace] = []
            for step in range(steps):
                data.append(
                    {
                        "type": "scatter",
                        "x": [epoch.number for epoch in epochs],
                        "y": [_at(getattr(epoch, name), step) for epoch in epochs],
                        "name": f"step {step + 1}",
                        "mode": "lines+markers" if len(epochs) < 30 else "lines",
                        "line": {"color": ramp(step, steps), "width": 2},
                        "marker": {"size": 5},
                        "hovertemplate": f"step {step + 1}, epoch %{{x}}: {unit} %{{y:.4g}}<extra></extra>",
                    }
                )
                if name == "step_weights":
                    data[-1] |= {"stackgroup": "weights", "fillcolor": faded(ramp(step, steps), 0.55)}
            shown = layout("epoch", "", yaxis={"rangemode": "tozero"})
            states.append(State(data, shown))
    charts = [Chart("step-weights", "Weight of each step's loss", weights)]
    charts.append(Chart("step-losses", "Target loss after each step", losses))
    return ChartPanel(charts, [label for label, _ in chosen], [[] for _ in chosen])


def faded(colour: str, opacity: float) -> str:
    """A colour of six hex digits, see-through."""
    red, green, blue = (int(colour[place : place + 2], 16) for place in (1, 3, 5))
    return f"rgba({red},{green},{blue},{opacity})"


def _at(row: Sequence[Number], step: int) -> Number:
    return row[step] if step < len(row) else None
