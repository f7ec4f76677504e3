"""Accuracy and confusions by class, and the embeddings of a test task in a plane."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from metawrap.report.charts import Chart, ChartPanel, State, Trace, layout
from metawrap.report.gather import COLOURS, Group, shown_runs
from metawrap.report.records import Count, Episode, Example, RunRecords

# A table of confusions has at most this many classes; of more, a chart shows the most frequent ones.
_MOST_IN_TABLE, _MOST_ROWS = 30, 20
_MOST_IN_PLANE = 20
_WRONG = "#d05a45"
# The kinds of points in a plane.
_POINTS = {"star": "support", "circle": "target, right", "x": "target, taken for another class"}


def by_class(groups: Sequence[Group]) -> ChartPanel | None:
    """Accuracy by class, and confusions by name; None if no run recorded them. The choices are runs."""
    runs = [shown for shown in shown_runs(groups) if shown.run.right]
    if not runs:
        return None
    charts = [Chart("classes-accuracy", "Accuracy by class", [_accuracies(each.run, each.colour) for each in runs])]
    confusions = [_confusions(each.run) for each in runs]
    if any(state.data for state in confusions):
        charts.append(Chart("classes-confusion", "Confusion", confusions))
    return ChartPanel(charts, [each.label for each in runs], [[] for _ in runs])


def _accuracies(run: RunRecords, colour: str) -> State:
    """The lowest accuracy on top; of many classes those at both ends, with a gap between."""
    if len(run.right) <= 2 * _MOST_ROWS and run.class_count <= len(run.right):
        rows: list[Count | None] = list(run.right)
    else:
        rows = [*run.right[:_MOST_ROWS], None, *run.right[-_MOST_ROWS:]]
    names = [f"… {run.class_count - 2 * _MOST_ROWS} more" if each is None else each.name for each in rows]
    return _bars(rows, names, colour, "% of the class's targets")


def _confusions(run: RunRecords) -> State:
    """A table, if it has all classes; else the most frequent confusions, as a share of the targets that allowed them.

    A cell is that share too; the cells of a row need not make 100 %, as tasks differ in their classes.
    """
    names = [each.name for each in run.right]
    if run.class_count > len(names) or not 1 < len(names) <= _MOST_IN_TABLE or len(set(names)) < len(names):
        shown = sorted(run.confusions[:_MOST_ROWS], key=lambda each: -each.percent)
        labels = [f"{each.name} → {each.taken_for}" for each in shown]
        return _bars(list(shown), labels, _WRONG, "% of targets")
    names.sort()
    place = {name: number for number, name in enumerate(names)}
    cells: list[list[Count | None]] = [[None] * len(names) for _ in names]
    for each in (*run.right, *run.confusions):
        if each.name in place and each.taken_for in place:
            cells[place[each.name]][place[each.taken_for]] = each
    grid = {
        "type": "heatmap",
        "z": [[0.0 if each is None else each.percent for each in row] for row in cells],
        "text": [["" if each is None or not each.times else str(each.times) for each in row] for row in cells],
        "customdata": [[f"{names[y]} taken for {names[x]}" for x in range(len(names))] for y in range(len(names))],
        "texttemplate": "%{text}" if len(names) <= _MOST_ROWS else "",
        "hovertemplate": "%{customdata}: %{text} times, %{z:.0f} %<extra></extra>",
        "colorscale": [[0, "rgba(59,125,216,0)"], [1, "rgba(59,125,216,0.9)"]],
        "zmin": 0,
        "zmax": 100,
        "showscale": False,
        "xgap": 1,
        "ygap": 1,
    }
    axes = layout("taken for", "class", height=_height(len(names)) + 80, xaxis=_names(names), yaxis=_names(names))
    axes["xaxis"] |= {"tickangle": -40, "showgrid": False}
    axes["yaxis"] |= {"autorange": "reversed", "showgrid": False}
    return State([grid], axes)


def _bars(rows: Sequence[Count | None], names: Sequence[str], colour: str, share: str) -> State:
    bars = {
        "type": "bar",
        "orientation": "h",
        "y": list(range(len(rows))),
        "x": [None if each is None else each.percent for each in rows],
        "text": ["" if each is None else f"{each.times} of {each.targets}" for each in rows],
        "customdata": list(names),
        "textposition": "outside",
        "textangle": 0,
        "hovertemplate": "%{customdata}: %{x:.0f} %, %{text} targets<extra></extra>",
        "marker": {"color": colour},
        "showlegend": False,
    }
    percent = {"range": [0, 128], "tickmode": "array", "tickvals": [0, 25, 50, 75, 100]}
    axes = layout(share, "", height=_height(len(rows)), xaxis=percent, yaxis=_names(names), bargap=0.25)
    axes["yaxis"] |= {"autorange": "reversed", "showgrid": False}
    return State([bars] if rows else [], axes)


def _names(names: Sequence[str]) -> dict[str, Any]:
    return {
        "tickmode": "array",
        "tickvals": list(range(len(names))),
        "ticktext": [each if len(each) <= 34 else f"{each[:16]}…{each[-17:]}" for each in names],
    }


def _height(rows: int) -> int:
    return max(260, 80 + 19 * rows)


def embeddings(groups: Sequence[Group]) -> ChartPanel | None:
    """The plane of each kept test task; None if no run recorded one. The choices are tasks."""
    found = [
        (("" if len(groups) == 1 else f"{shown.label}, ") + f"task {episode.task} ({episode.why})", episode)
        for shown in shown_runs(groups)
        for episode in shown.run.episodes
        if any(each.at for each in (*episode.support, *episode.target))
    ]
    if not found:
        return None
    chart = Chart("embedding", "Embeddings of one test task", [_plane(episode) for _, episode in found])
    return ChartPanel([chart], [label for label, _ in found], [[] for _ in found], list(_POINTS.items()), choice="task")


def _plane(episode: Episode) -> State:
    data = []
    for label, name in enumerate(episode.classes[:_MOST_IN_PLANE]):
        shown = True
        for mark, points in (
            ("star", [each for each in episode.support if each.label == label]),
            ("circle", [each for each in episode.target if each.label == label == each.prediction]),
            ("x", [each for each in episode.target if each.label == label != each.prediction]),
        ):
            if points := [each for each in points if each.at]:
                data.append(_points(label, name, mark, points, episode.classes) | {"showlegend": shown})
                shown = False
    shares = ["" if share is None else f", {100 * share:.0f} % of the variance" for share in episode.shares[:2]]
    first, second = [*shares, "", ""][:2]
    equal = {"scaleanchor": "x", "scaleratio": 1}
    return State(data, layout(f"component 1{first}", f"component 2{second}", height=460, yaxis=equal))


def _points(label: int, name: str, mark: str, points: Sequence[Example], classes: Sequence[str]) -> Trace:
    colour = COLOURS[label % len(COLOURS)]
    taken = [
        "support"
        if each.prediction is None
        else f"target, taken for {classes[each.prediction] if 0 <= each.prediction < len(classes) else '?'}"
        for each in points
    ]
    return {
        "type": "scatter",
        "mode": "markers",
        "x": [each.at[0] for each in points],
        "y": [each.at[1] for each in points],
        "name": name,
        "legendgroup": f"class {label}",
        "text": taken,
        "hovertemplate": "%{fullData.name}<br>%{text}<extra></extra>",
        "line": {"color": colour, "width": 1},
        "marker": {"size": 15 if mark == "star" else 9, "symbol": mark, "color": colour},
    }
