"""The parts of the page that are words and tables, as plain values for page.html to show."""

from __future__ import annotations

import json
import statistics
from base64 import b64encode
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from metawrap.layers.norm_policies import kind_of
from metawrap.report.gather import Group, differences
from metawrap.report.records import RunRecords, Score
from metawrap.training.progress import duration

_COLUMNS = {"before": "before adaptation", "after": "after adaptation", "ensemble": "best averaged"}
_OVER_TASKS = "± 95 % interval over tasks"
# A page stays readable, and of a size like that of the files: the table of confusions is quadratic.
_MOST_CLASSES, _MOST_CONFUSIONS = 100, 50
Values = dict[str, Any]


def cards(groups: Sequence[Group]) -> list[Values]:
    """A card for each group: accuracy after adaptation under the policy of training, and the progress of its runs."""
    return [_card(group) for group in groups]


def _card(group: Group) -> Values:
    runs, settings = group.runs, group.settings
    trained = [run.scores.get(run.trained_norm or "", {}) for run in runs]
    epochs = " / ".join(str(run.epochs[-1].number if run.epochs else 0) for run in runs)
    durations = ", ".join(duration(run.seconds) for run in runs if run.seconds is not None)
    size = f"{settings.get('ways', '?')}-way {settings.get('shots', '?')}-shot" if "ways" in settings else "tasks"
    facts = [
        f"{size} on {settings.get('data', '?')}",
        f"epochs {epochs} of {settings.get('epochs', '?')}",
        _seeds(runs),
        f"trained in {durations}" if durations else "",
    ]
    return {"group": group, "score": _score(trained, "after"), "facts": [fact for fact in facts if fact]}


def _seeds(runs: Sequence[RunRecords]) -> str:
    return f"seed{'s' if len(runs) > 1 else ''} {', '.join(str(run.seed) for run in runs)}"


def _score(scores: Sequence[dict[str, Score]], column: str) -> tuple[float, float | None] | None:
    """In percent: the mean and standard deviation of several runs, or the accuracy and interval of one."""
    found = [each[column] for each in scores if column in each]
    if not found:
        return None
    values = [100 * score.accuracy for score in found]
    if len(found) > 1:
        return statistics.fmean(values), statistics.stdev(values)
    return values[0], None if found[0].interval is None else 100 * found[0].interval


def final_table(groups: Sequence[Group]) -> Values | None:
    """Accuracy in the final test by batch-norm policy; None if no run has been tested."""
    tested = [(group, runs) for group in groups if (runs := [run for run in group.runs if run.scores])]
    known = {name for _, runs in tested for run in runs for scores in run.scores.values() for name in scores}
    columns = {name: title for name, title in _COLUMNS.items() if name in known}
    if not columns:
        return None
    parts = []
    for group, runs in tested:
        rows = []
        for norm in dict.fromkeys(norm for run in runs for norm in run.scores):
            scores = [run.scores.get(norm, {}) for run in runs]
            is_trained = all(run.trained_norm == norm for run in runs)
            rows.append(_row(norm, kind_of(norm), scores, columns, is_trained=is_trained))
        for run in runs if len(runs) > 1 else ():
            norm = run.trained_norm if run.trained_norm in run.scores else next(iter(run.scores))
            rows.append(_row(f"seed {run.seed}, {norm}", _OVER_TASKS, [run.scores[norm]], columns, is_seed=True))
        spread = "± standard deviation over seeds" if len(runs) > 1 else _OVER_TASKS
        parts.append({"group": group, "note": f"{_seeds(runs)}; {spread}", "rows": rows})
    return {"columns": list(columns.values()), "parts": parts}


def _row(
    name: str,
    note: str,
    scores: Sequence[dict[str, Score]],
    columns: Sequence[str] | Values,
    is_trained: bool = False,
    is_seed: bool = False,
) -> Values:
    cells = [_score(scores, column) for column in columns]
    return {"name": name, "note": note, "scores": cells, "is_trained": is_trained, "is_seed": is_seed}


def episodes(groups: Sequence[Group]) -> list[Values]:
    """The test tasks of the first run of each group that kept some, each with its table of confusions."""
    parts = []
    for group in groups:
        run = next((run for run in group.runs if run.episodes), None)
        if run is not None:
            shown = []
            for episode in run.episodes:
                counts = Counter((each.label, each.prediction) for each in episode.target)
                right = sum(count for (label, prediction), count in counts.items() if label == prediction)
                most = max(counts.values())
                classes = episode.classes[:_MOST_CLASSES]
                matrix = classes if len(episode.classes) <= _MOST_CONFUSIONS else []
                more = len(episode.classes) - len(classes)
                shown.append(
                    {"episode": episode, "right": right, "counts": counts, "most": most}
                    | {"classes": classes, "matrix": matrix, "more": more}
                )
            parts.append({"group": group, "label": group.run_label(run), "episodes": shown})
    return parts


def image_source(png: bytes) -> str:
    """A picture as the address that holds it."""
    return f"data:image/png;base64,{b64encode(png).decode()}"


def commands(groups: Sequence[Group]) -> dict[str, list[str]]:
    """The command of each run -> the names of the runs that it started; "" of runs that recorded none."""
    return _shared((run.command or "", group.run_label(run)) for group in groups for run in group.runs)


def machines(groups: Sequence[Group]) -> list[tuple[list[str], Values]]:
    """Each machine that a run recorded, with the names of its runs."""
    runs = [(group.run_label(run), run.machine) for group in groups for run in group.runs if run.machine]
    found = _shared((json.dumps(machine, sort_keys=True), label) for label, machine in runs)
    return [(labels, _texts(json.loads(machine))) for machine, labels in found.items()]


def _shared(pairs: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for text, label in pairs:
        found.setdefault(text, []).append(label)
    return found


def settings(groups: Sequence[Group]) -> Values:
    """The settings that differ between the groups, and all settings of each group."""
    different = differences([group.settings for group in groups])
    whole = []
    for group in groups:
        shown = {name: value for name, value in group.settings.items() if name != "seed"}
        whole.append((group.label, _texts(shown | {"seeds": ", ".join(str(run.seed) for run in group.runs)})))
    return {"different": {name: list(map(_text, values)) for name, values in different.items()}, "whole": whole}


def _texts(values: Values) -> dict[str, str | None]:
    return {name: _text(value) for name, value in values.items()}


def _text(value: Any) -> str | None:
    return value if value is None or isinstance(value, str) else json.dumps(value)
