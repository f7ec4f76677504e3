"""What differs from layer to layer: learned inner rates, and batch-norm statistics; with a slider over epochs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from metawrap.report.charts import SYMBOLS, Chart, ChartPanel, State, Trace, layout, plain, ramp
from metawrap.report.gather import COLOURS, Group
from metawrap.report.series import (
    KINDS,
    Panel,
    epoch_of,
    norm_layers,
    norms_at,
    rate_panels,
    rates_at,
    slides,
    spread_of,
    steps_of,
    with_norms,
    with_rates,
)
from metawrap.training.run_records import Epoch, RunRecords

_MOST_TICKS = 24
ZERO_LINE = {"zeroline": True, "zerolinewidth": 2}


def learned_rates(groups: Sequence[Group]) -> ChartPanel | None:
    """Layers on the x axis, a line for each inner step, a colour for each seed; None where no run learned rates."""
    runs = with_rates(groups)
    if not runs:
        return None
    numbers = slides(sorted({epoch.number for _, run in runs for epoch in run.epochs if epoch.rates}))
    panels = rate_panels([run for _, run in runs])
    charts = [_rate_chart(place, panel, runs, numbers) for place, panel in enumerate(panels)]
    steps = steps_of([rates.median for _, run in runs for epoch in run.epochs for rates in epoch.rates.values()])
    return ChartPanel(charts, [], [[str(number) for number in numbers]], steps if len(runs) > 1 else 0)


def _rate_chart(place: int, panel: Panel, runs: list[tuple[str, RunRecords]], numbers: list[int]) -> Chart:
    every = [epoch.rates[name].median for _, run in runs for epoch in run.epochs for name in epoch.rates]
    steps, x = steps_of(every), list(range(len(panel.layers)))
    data: list[Trace] = []
    lines: list[tuple[RunRecords, int]] = []
    for number, (label, run) in enumerate(runs):
        colour = COLOURS[number % len(COLOURS)]
        # What the legend shows: a click on it hides all lines of the run.
        if len(runs) > 1:
            key = {"x": [None], "y": [None], "mode": "lines", "line": {"color": colour, "width": 4}}
            data.append({"type": "scatter", "name": plain(label), "legendgroup": f"run {number}", **key})
        for step in range(steps):
            own = ramp(step, steps) if len(runs) == 1 else colour
            data.append(_rate_line(label, number, step, steps, own, len(runs) == 1, x, panel))
            lines.append((run, step))
    shown = [_rates_on(data, lines, panel, number) for number in numbers]
    for trace, last in zip(data, shown[-1], strict=True):
        trace.update(last)
    values = [value for slide in shown for trace in slide for value in trace.get("y", ())]
    return Chart(f"rates-{place}", f"Rates of the {panel.title}", [State(data, _rate_layout(panel, values), shown)])


def _rate_line(
    label: str, number: int, step: int, steps: int, colour: str, alone: bool, x: list[int], panel: Panel
) -> Trace:
    return {
        "type": "scatter",
        "x": x,
        "y": [],
        "text": [plain(name) for name in panel.parameters],
        "name": f"step {step + 1}",
        "legendgroup": f"step {step}" if alone else f"run {number}",
        "showlegend": alone,
        "mode": "lines+markers",
        "connectgaps": False,
        "opacity": 1 if alone else 0.45 + 0.55 * (step + 1) / steps,
        "line": {"color": colour, "width": 1.8},
        "marker": _marker(step, colour),
        "meta": {"run": plain(label), "step": step + 1},
        "hovertemplate": f"{plain(label)}, step {step + 1}<br>%{{text}}: %{{y:.4g}}<extra></extra>",
    }


def _marker(step: int, colour: str) -> dict[str, Any]:
    return {"size": 7, "symbol": SYMBOLS[step % len(SYMBOLS)], "color": colour}


def _rates_on(data: list[Trace], lines: list[tuple[RunRecords, int]], panel: Panel, number: int) -> list[Trace]:
    drawn = iter(lines)
    slide: list[Trace] = []
    for trace in data:
        if "meta" not in trace:
            slide.append({})
            continue
        run, step = next(drawn)
        slide.append({"y": rates_at(epoch_of(run, number), panel.parameters, step)})
    return slide


def _rate_layout(panel: Panel, values: list[float | None]) -> dict[str, Any]:
    shown = layout("", "inner learning rate", xaxis=_layer_axis(panel.layers), height=420)
    # The same range at all epochs, so that what moves is the rates.
    shown["yaxis"] |= {"range": list(spread_of([*values, 0.0])), **ZERO_LINE}
    return shown


def _layer_axis(layers: Sequence[str]) -> dict[str, Any]:
    stride = -(-len(layers) // _MOST_TICKS)
    places = list(range(0, len(layers), max(1, stride)))
    names = [plain(shortened(layers[place])) for place in places]
    return {
        "tickmode": "array",
        "tickvals": places,
        "ticktext": names,
        "range": [-0.5, len(layers) - 0.5],
        "title": {"text": ""},
    }


def shortened(name: str, most: int = 22) -> str:
    """The end of a long name, which tells layers apart."""
    return name if len(name) <= most else f"…{name[1 - most :]}"


def norm_statistics(groups: Sequence[Group]) -> ChartPanel | None:
    """Running mean and variance, scale and shift by layer and inner step; None where no run recorded batch norms."""
    runs = with_norms(groups)
    if not runs:
        return None
    chosen = [slides([epoch.number for epoch in run.epochs if epoch.norms]) for _, run in runs]
    charts = []
    for part, title in KINDS.items():
        states = [_norm_state(run, part, numbers) for (_, run), numbers in zip(runs, chosen, strict=True)]
        if any(state.data for state in states):
            charts.append(Chart(f"norms-{part.replace('_', '-')}", title.capitalize(), states))
    slide_names = [[str(number) for number in numbers] for numbers in chosen]
    return ChartPanel(charts, [label for label, _ in runs], slide_names)


def _norm_state(run: RunRecords, part: str, numbers: list[int]) -> State:
    epochs = [epoch for number in numbers if (epoch := epoch_of(run, number)) is not None]
    layers = norm_layers(run)
    rows = [epoch.norms[layer][part].median for epoch in epochs for layer in epoch.norms if part in epoch.norms[layer]]
    steps = steps_of(rows)
    shown = [[_norm_slide(epoch, layers, part, step) for step in range(steps)] for epoch in epochs]
    data = [_norm_line(layers, step, steps) | shown[-1][step] for step in range(steps)]
    ends = [
        value
        for epoch in epochs
        for step in range(steps)
        for each in norms_at(epoch, layers, part, step)
        for value in each
    ]
    axis = layout("", "", xaxis=_layer_axis(layers), yaxis={"range": list(spread_of(ends)), **ZERO_LINE}, height=320)
    return State(data, axis, shown)


def _norm_line(layers: Sequence[str], step: int, steps: int) -> Trace:
    shift = 0.5 * (step - (steps - 1) / 2) / max(steps, 2)
    colour = ramp(step, steps)
    return {
        "type": "scatter",
        "x": [place + shift for place in range(len(layers))],
        "text": [plain(layer) for layer in layers],
        "name": f"step {step + 1}" if steps > 1 else "all steps",
        "mode": "markers",
        "marker": {"size": 7, "color": colour, "symbol": SYMBOLS[step % len(SYMBOLS)]},
        "hovertemplate": f"step {step + 1}<br>%{{text}}: median %{{y:.4g}}<extra></extra>",
    }


def _norm_slide(epoch: Epoch, layers: Sequence[str], part: str, step: int) -> Trace:
    low, median, high = norms_at(epoch, layers, part, step)
    up = [None if m is None or h is None else h - m for m, h in zip(median, high, strict=True)]
    down = [None if m is None or each is None else m - each for m, each in zip(median, low, strict=True)]
    error = {"type": "data", "symmetric": False, "array": up, "arrayminus": down, "thickness": 1.4, "width": 0}
    return {"y": median, "error_y": error}
