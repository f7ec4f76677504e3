"""Learned inner rates and batch-norm statistics by layer, with a slider over epochs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from metawrap.report.charts import Chart, ChartPanel, State, Trace, layout, line, ramp, steps_of, symbol, value_at
from metawrap.report.gather import Group, ShownRun, recorded, shown_runs
from metawrap.report.records import Epoch, Number

# A slider offers at most this many epochs, at equal distances, the first and the last among them.
MOST_SLIDES = 40
_MOST_TICKS = 24
_ZERO_LINE = {"zeroline": True, "zerolinewidth": 2}
_NORM_PARTS = {
    "running_mean": "Running mean",
    "running_var": "Running variance",
    "weight": "Scale (gamma)",
    "bias": "Shift (beta)",
}


def learned_rates(groups: Sequence[Group]) -> ChartPanel | None:
    """Layers on the x axis, a line for each inner step, a colour for each run; None if no run learned its rates."""
    runs = [shown for shown in shown_runs(groups) if recorded(shown.run, "rates")]
    if not runs:
        return None
    epochs = [epoch for shown in runs for epoch in shown.run.epochs if epoch.rates]
    numbers = _slides(sorted({epoch.number for epoch in epochs}))
    names = list(dict.fromkeys(name for epoch in epochs for name in epoch.rates))
    steps = steps_of([rates.median for epoch in epochs for rates in epoch.rates.values()])
    charts = [
        _rate_chart(f"rates-{place}", kind, parameters, runs, numbers, steps)
        for place, (kind, parameters) in enumerate(_parameter_kinds(names).items())
    ]
    key = [(symbol(step), f"step {step + 1}") for step in range(steps)]
    choices, key = ([], key) if len(runs) > 1 else ([runs[0].label], [])
    return ChartPanel(charts, choices, [[str(number) for number in numbers]], key)


def _parameter_kinds(names: Sequence[str]) -> dict[str, list[str]]:
    """Weights and biases apart; all parameters together if there are more than two kinds."""
    kinds: dict[str, list[str]] = {}
    for name in names:
        kind = name.rpartition(".")[2]
        kinds.setdefault({"weight": "weights", "bias": "biases"}.get(kind, kind), []).append(name)
    return kinds if len(kinds) <= 2 else {"parameters": list(names)}


def _rate_chart(
    name: str, kind: str, parameters: list[str], runs: list[ShownRun], numbers: list[int], steps: int
) -> Chart:
    is_alone = len(runs) == 1
    entries = [] if is_alone else _legend_entries(runs)
    slides: list[list[Trace]] = [[] if is_alone else [_entry_at(each, number) for each in runs] for number in numbers]
    lines: list[Trace] = []
    for number, shown in enumerate(runs):
        by_number = {epoch.number: epoch for epoch in shown.run.epochs}
        for step in range(steps):
            colour = ramp(step, steps) if is_alone else shown.colour
            lines.append(
                line(
                    f"step {step + 1}",
                    list(range(len(parameters))),
                    [],
                    colour,
                    "%{meta.run}, %{fullData.name}<br>%{text}: %{y:.4g}",
                    mode="lines+markers",
                    text=parameters,
                    legendgroup=f"step {step}" if is_alone else f"run {number}",
                    showlegend=is_alone,
                    connectgaps=False,
                    opacity=1 if is_alone else 0.45 + 0.55 * (step + 1) / steps,
                    line={"color": colour, "width": 1.8, "dash": shown.dash},
                    marker={"size": 7, "symbol": symbol(step), "color": colour},
                    meta={"run": shown.label, "step": step + 1},
                )
            )
            for slide, epoch in zip(slides, (by_number.get(each) for each in numbers), strict=True):
                slide.append({"y": _rates_at(epoch, parameters, step)})
    values = [value for slide in slides for trace in slide for value in trace.get("y", ())]
    layers = parameters if kind == "parameters" else [each.rpartition(".")[0] or each for each in parameters]
    axis = layout("", "inner learning rate", xaxis=_layer_axis(layers), height=420)
    # The y axis stays the same at all epochs, so that only the rates move.
    axis["yaxis"] |= _range_of([*values, 0.0])
    data = [trace | last for trace, last in zip(entries + lines, slides[-1], strict=True)]
    return Chart(name, f"Rates of the {kind}", [State(data, axis, slides)])


def _legend_entries(runs: list[ShownRun]) -> list[Trace]:
    """One entry for each run. A click on the entry hides all lines of the run."""
    entries = []
    for number, shown in enumerate(runs):
        style = {"color": shown.colour, "width": 4, "dash": shown.dash}
        empty = {"type": "scatter", "x": [None], "y": [None], "mode": "lines", "line": style}
        entries.append({"name": shown.label, "legendgroup": f"run {number}", **empty})
    return entries


def _entry_at(shown: ShownRun, number: int) -> Trace:
    """The legend does not promise lines of a run that has none at the slider's epoch."""
    has_lines = any(epoch.number == number and epoch.rates for epoch in shown.run.epochs)
    return {"name": shown.label if has_lines else f"{shown.label}: no epoch {number}"}


def _rates_at(epoch: Epoch | None, parameters: Sequence[str], step: int) -> list[Number]:
    rates = epoch.rates if epoch else {}
    return [value_at(rates[name].median, step) if name in rates else None for name in parameters]


def norm_statistics(groups: Sequence[Group]) -> ChartPanel | None:
    """Running mean and variance, scale and shift by layer and inner step; None if no run recorded batch norms."""
    runs = [each for each in shown_runs(groups) if recorded(each.run, "norms")]
    if not runs:
        return None
    by_number = [{epoch.number: epoch for epoch in each.run.epochs if epoch.norms} for each in runs]
    numbers = [_slides(sorted(epochs)) for epochs in by_number]
    shown = [[epochs[number] for number in own] for epochs, own in zip(by_number, numbers, strict=True)]
    charts = []
    for part, title in _NORM_PARTS.items():
        states = [_norm_state(epochs, part) for epochs in shown]
        if any(state.data for state in states):
            charts.append(Chart(f"norms-{part.replace('_', '-')}", title, states))
    names = [[str(number) for number in own] for own in numbers]
    return ChartPanel(charts, [each.label for each in runs], names, caption="median and quartiles over channels")


def _norm_state(epochs: list[Epoch], part: str) -> State:
    layers = list(dict.fromkeys(layer for epoch in epochs for layer in epoch.norms))
    steps = steps_of([parts[part].median for epoch in epochs for parts in epoch.norms.values() if part in parts])
    slides = [[_norm_slide(epoch, layers, part, step) for step in range(steps)] for epoch in epochs]
    data = []
    for step in range(steps):
        shift = 0.5 * (step - (steps - 1) / 2) / max(steps, 2)
        data.append(
            line(
                f"step {step + 1}" if steps > 1 else "all steps",
                [place + shift for place in range(len(layers))],
                [],
                ramp(step, steps),
                f"step {step + 1}<br>%{{text}}: median %{{y:.4g}}",
                mode="markers",
                text=layers,
                marker={"size": 7, "color": ramp(step, steps), "symbol": symbol(step)},
            )
            | slides[-1][step]
        )
    ends: list[Number] = []
    for trace in (trace for slide in slides for trace in slide):
        for middle, up, down in zip(trace["y"], trace["error_y"]["array"], trace["error_y"]["arrayminus"], strict=True):
            ends += [] if middle is None else [middle, middle + (up or 0), middle - (down or 0)]
    return State(data, layout("", "", xaxis=_layer_axis(layers), yaxis=_range_of(ends), height=320), slides)


def _norm_slide(epoch: Epoch, layers: Sequence[str], part: str, step: int) -> Trace:
    """Medians over channels, with bars to the quartiles."""
    rows = [epoch.norms.get(layer, {}).get(part) for layer in layers]
    low, middle, high = (
        [None if row is None else value_at(getattr(row, name), step) for row in rows]
        for name in ("low", "median", "high")
    )
    bars = {"array": _distances(middle, high), "arrayminus": _distances(low, middle)}
    return {"y": middle, "error_y": {"type": "data", "symmetric": False, "thickness": 1.4, "width": 0, **bars}}


def _distances(low: Sequence[Number], high: Sequence[Number]) -> list[Number]:
    return [None if a is None or b is None else b - a for a, b in zip(low, high, strict=True)]


def _slides(epochs: list[int]) -> list[int]:
    """The epochs that a slider offers."""
    most, last = min(len(epochs), MOST_SLIDES), len(epochs) - 1
    return [epochs[round(place * last / max(1, most - 1))] for place in range(most)]


def _layer_axis(layers: Sequence[str]) -> dict[str, Any]:
    places = list(range(0, len(layers), max(1, -(-len(layers) // _MOST_TICKS))))
    return {
        "tickmode": "array",
        "tickvals": places,
        "ticktext": [shortened(layers[place]) for place in places],
        "range": [-0.5, len(layers) - 0.5],
        "title": {"text": ""},
    }


def _range_of(values: Sequence[Number]) -> dict[str, Any]:
    """A y axis that holds all values with some room, and shows zero."""
    present = [value for value in values if value is not None] or [0.0]
    low, high = min(present), max(present)
    room = 0.06 * (high - low) or 1.0
    return {"range": [low - room, high + room], **_ZERO_LINE}


def shortened(name: str, most: int = 22) -> str:
    """The end of a long name, because layers differ in the end of their names."""
    return name if len(name) <= most else f"…{name[1 - most :]}"
