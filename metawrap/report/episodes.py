"""Test tasks with their images: what was shown, what was asked, what was answered, and the confusion of it."""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Sequence
from html import escape

from metawrap.report.gather import Group
from metawrap.report.words import dot
from metawrap.training.run_records import Episode, Example


def episodes(groups: Sequence[Group]) -> str:
    """The test tasks that were kept, of the first run of each group that has some; empty where none has."""
    parts = []
    for number, group in enumerate(groups):
        run = next((run for run in group.runs if run.episodes), None)
        if run is not None:
            shown = "".join(_episode(episode) for episode in run.episodes)
            parts.append(f"<h3>{dot(number)}{escape(group.run_label(run))}</h3>{shown}")
    return "".join(parts)


def _episode(episode: Episode) -> str:
    right = sum(example.prediction == example.label for example in episode.target)
    head = f"Test task {episode.task} ({escape(episode.why)}): {right} of {len(episode.target)} targets right"
    rows = "".join(_class_row(episode, label) for label in range(len(episode.classes)))
    titles = ("class", "support", "targets, and what they were taken for")
    columns = "".join(f"<th scope=col>{title}</th>" for title in titles)
    images = f"<table class=episode><thead><tr>{columns}</tr></thead><tbody>{rows}</tbody></table>"
    return f"<h4>{head}</h4><div class=task>{images}{_confusion(episode)}</div>"


def _class_row(episode: Episode, label: int) -> str:
    support = "".join(_image(each, "support") for each in episode.support if each.label == label and each.png)
    target = "".join(_target(each) for each in episode.target if each.label == label and each.png)
    name = f"<b>{label}</b> <small>{escape(episode.classes[label])}</small>"
    return f"<tr><th scope=row>{name}</th><td>{support or 'none'}</td><td>{target or 'none'}</td></tr>"


def _target(example: Example) -> str:
    right = example.prediction == example.label
    sure = "" if example.probability is None else f" <small>{100 * example.probability:.0f}&nbsp;%</small>"
    guess = "?" if example.prediction is None else example.prediction
    caption = f"<figcaption>{'✓' if right else '✗'} {guess}{sure}</figcaption>"
    return f"<figure class={'right' if right else 'wrong'}>{_image(example, 'target')}{caption}</figure>"


def _image(example: Example, part: str) -> str:
    content = base64.b64encode(example.png or b"").decode()
    return f"<img alt='{part} image of class {example.label}' src='data:image/png;base64,{content}'>"


def _confusion(episode: Episode) -> str:
    ways, counts = range(len(episode.classes)), Counter((each.label, each.prediction) for each in episode.target)
    most = max(counts.values())
    rows = []
    for label in ways:
        cells = "".join(_cell(counts[label, guess], most, label == guess) for guess in ways)
        rows.append(f"<tr><th scope=row>{label}</th>{cells}</tr>")
    head = "".join(f"<th scope=col>{guess}</th>" for guess in ways)
    table = f"<table class=confusion><thead><tr><td></td>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    return f"<div class=matrix><p>true class (rows) by prediction (columns)</p><div class=wide>{table}</div></div>"


def _cell(count: int, most: int, right: bool) -> str:
    if not count:
        return "<td>·</td>"
    return f"<td class={'right' if right else 'wrong'} style='--share:{round(20 + 80 * count / most)}%'>{count}</td>"
