"""The parts of the page that are words: cards, final table, command, settings, machine. All texts are escaped."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from html import escape
from typing import Any

from metawrap.report.gather import COLOURS, Group, differences
from metawrap.training.progress import duration
from metawrap.training.run_records import RunRecords, Score

_KINDS = {"batch": "transductive", "running": "inductive", "support": "inductive"}
_COLUMNS = {"before": "before adaptation", "after": "after adaptation", "ensemble": "best averaged"}


def final_table(groups: Sequence[Group]) -> str:
    """Accuracy of the final test by batch-norm policy; empty where no run has been tested."""
    tested = [(group, [run for run in group.runs if run.scores]) for group in groups]
    tested = [(group, runs) for group, runs in tested if runs]
    columns = [
        kind
        for kind in _COLUMNS
        if any(kind in each for _, runs in tested for run in runs for each in run.scores.values())
    ]
    if not columns:
        return ""
    head = "".join(f"<th scope=col>{_COLUMNS[kind]}</th>" for kind in columns)
    body = "".join(_rows(group, runs, columns, groups.index(group)) for group, runs in tested)
    table = f"<table class=numbers><thead><tr><th scope=col>batch norm</th>{head}</tr></thead>{body}</table>"
    return f"<div class=wide>{table}</div>"


def _rows(group: Group, runs: Sequence[RunRecords], columns: Sequence[str], number: int) -> str:
    seeds = ("seeds " if len(runs) > 1 else "seed ") + ", ".join(escape(str(run.seed)) for run in runs)
    spread = "± standard deviation over seeds" if len(runs) > 1 else "± 95 % interval over tasks"
    title = f"{dot(number)}<b>{escape(group.label)}</b> <small>{seeds}; {spread}</small>"
    rows = [f"<tr class=group><th colspan={len(columns) + 1} scope=rowgroup>{title}</th></tr>"]
    rows += [_row(_policy(norm, runs), [run.scores.get(norm, {}) for run in runs], columns) for norm in _norms(runs)]
    if len(runs) > 1:
        for run in runs:
            norm = run.trained_norm if run.trained_norm in run.scores else next(iter(run.scores))
            name = f"seed {escape(str(run.seed))}, {escape(norm)} <small>± 95 % interval over tasks</small>"
            rows.append(_row(name, [run.scores[norm]], columns, "seed"))
    return f"<tbody>{''.join(rows)}</tbody>"


def _norms(runs: Sequence[RunRecords]) -> list[str]:
    return list(dict.fromkeys(norm for run in runs for norm in run.scores))


def _policy(norm: str, runs: Sequence[RunRecords]) -> str:
    kind = f" <small>{_KINDS[norm]}</small>" if norm in _KINDS else ""
    return f"{escape(norm)}{kind}{' *' if all(run.trained_norm == norm for run in runs) else ''}"


def _row(name: str, scores: Sequence[dict[str, Score]], columns: Sequence[str], style: str = "") -> str:
    cells = "".join(f"<td>{_score([each[kind] for each in scores if kind in each])}</td>" for kind in columns)
    return f"<tr class='{style}'><th scope=row>{name}</th>{cells}</tr>"


def _score(scores: Sequence[Score]) -> str:
    if not scores:
        return "none"
    values = [100 * score.accuracy for score in scores]
    spread = scores[0].interval if len(scores) == 1 else statistics.stdev(values) / 100
    around = "" if spread is None else f" <span class=spread>± {100 * spread:.2f}</span>"
    return f"{statistics.fmean(values):.2f}{around}&nbsp;%"


def glance(groups: Sequence[Group]) -> str:
    """A card for each group: its accuracy after adaptation under its own policy, and how far it has come."""
    return f"<div class=cards>{''.join(_card(group, number) for number, group in enumerate(groups))}</div>"


def _card(group: Group, number: int) -> str:
    scores = [
        run.scores[run.trained_norm]["after"]
        for run in group.runs
        if run.trained_norm in run.scores and "after" in run.scores[run.trained_norm]
    ]
    settings = group.settings
    done = " / ".join(str(run.epochs[-1].number if run.epochs else 0) for run in group.runs)
    facts = [
        f"{settings.get('ways', '?')}-way {settings.get('shots', '?')}-shot on {settings.get('data', '?')}",
        f"epochs {done} of {settings.get('epochs', '?')}",
        f"seed{'s' if len(group.runs) > 1 else ''} {', '.join(str(run.seed) for run in group.runs)}",
    ]
    facts += [f"trained in {_durations(group.runs)}"] if _durations(group.runs) else []
    value = _score(scores) if scores else "not tested yet"
    listed = "".join(f"<li>{escape(fact)}</li>" for fact in facts)
    return (
        f"<div class=card><h3>{dot(number)}{escape(group.label)}</h3><p class=value>{value}</p><ul>{listed}</ul></div>"
    )


def _durations(runs: Sequence[RunRecords]) -> str:
    return ", ".join(duration(run.seconds) for run in runs if run.seconds is not None)


def dot(number: int) -> str:
    """The group's colour."""
    return f"<span class=dot style='background:{COLOURS[number % len(COLOURS)]}'></span>"


def commands(groups: Sequence[Group]) -> str:
    """The command of each run, to be copied; one that several runs share once."""
    found: dict[str, list[str]] = {}
    for group in groups:
        for run in group.runs:
            found.setdefault(run.command or "", []).append(group.run_label(run))
    return "".join(_command(command, names) for command, names in found.items())


def _command(command: str, names: Sequence[str]) -> str:
    if not command:
        return f"<p class=missing>No command was recorded of {escape('; '.join(names))}.</p>"
    button = "<button type=button class=copy>Copy</button>"
    return (
        f"<p>{escape('; '.join(names))}</p><div class=command><pre><code>{escape(command)}</code></pre>{button}</div>"
    )


def settings(groups: Sequence[Group]) -> str:
    """What differs between the groups, and all settings of each."""
    parts = []
    if len(groups) > 1 and (different := differences([group.settings for group in groups])):
        head = "".join(f"<th scope=col>{escape(group.label)}</th>" for group in groups)
        rows = "".join(
            f"<tr><th scope=row>{escape(name)}</th>{''.join(f'<td>{_value(value)}</td>' for value in values)}</tr>"
            for name, values in different.items()
        )
        parts.append(
            "<h3>What differs</h3><div class=wide><table><thead><tr><th scope=col>setting</th>"
            f"{head}</tr></thead><tbody>{rows}</tbody></table></div>"
        )
    for group in groups:
        shown = {name: value for name, value in group.settings.items() if name != "seed"}
        shown["seeds"] = ", ".join(str(run.seed) for run in group.runs)
        parts.append(
            f"<details><summary>All settings of {escape(group.label)}</summary>{_definitions(shown)}</details>"
        )
    return "".join(parts)


def machines(groups: Sequence[Group]) -> str:
    """Each machine that was trained on, and by which runs; empty where none was recorded."""
    found: dict[str, list[str]] = {}
    for group in groups:
        for run in group.runs:
            if run.machine:
                found.setdefault(json.dumps(run.machine, sort_keys=True), []).append(group.run_label(run))
    return "".join(
        f"<p>{escape('; '.join(names))}</p>{_definitions(json.loads(text))}" for text, names in found.items()
    )


def _definitions(values: dict[str, Any]) -> str:
    items = "".join(f"<div><dt>{escape(name)}</dt><dd>{_value(value)}</dd></div>" for name, value in values.items())
    return f"<dl>{items}</dl>"


def _value(value: Any) -> str:
    if value is None:
        return "<span class=spread>default</span>"
    text = value if isinstance(value, str) else json.dumps(value)
    return escape(text)
