"""The page: sections, each with what to look at and how it was computed -> one HTML file that needs no network.

Texts of a run reach HTML escaped; what the charts are made of is JSON in which no tag can end its script.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from metawrap import __version__
from metawrap.errors import ArgumentError, MetaWrapError
from metawrap.report import words
from metawrap.report.charts import GLYPHS, ChartPanel, accuracy_by_step, curves, step_losses
from metawrap.report.episodes import episodes
from metawrap.report.gather import Group
from metawrap.report.layer_charts import learned_rates, norm_statistics
from metawrap.training.checkpoints import write_atomically
from metawrap.training.run_records import RunRecords


@dataclass(frozen=True)
class Section:
    """A part of the page. body: its HTML; empty where no run has it. missing: why some runs are not in it."""

    anchor: str
    title: str
    look: str
    body: str
    missing: str = ""


def write_report_page(groups: Sequence[Group], path: Path) -> None:
    """Writes the page.

    Raises:
        ArgumentError: it cannot be written there.
        MetaWrapError: plotly is not installed.
    """
    page = render(groups)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda handle: handle.write(page.encode("utf-8", "replace")))
    except OSError as error:
        raise ArgumentError(
            f"out: cannot write '{path}' ({error.strerror}). Name a file in a folder of yours."
        ) from error


def render(groups: Sequence[Group]) -> str:
    """The page's HTML."""
    library = _plotly()
    title = escape(" and ".join(group.label for group in groups[:3]) + (" and more" if len(groups) > 3 else ""))
    sections = [section for section in _sections(groups) if section.body or section.missing]
    contents = "".join(f"<li><a href='#{each.anchor}'>{each.title}</a></li>" for each in sections)
    body = "".join(_section(section) for section in sections)
    style, script = (files(__package__).joinpath(name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    folders = ", ".join(dict.fromkeys(str(run.path) for group in groups for run in group.runs))
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>{title}: what was learned</title>
<style>{style}</style>
</head>
<body>
<header><h1>{title}</h1>
<p>What these runs have learned, from their own records in {escape(folders)}.</p></header>
{words.glance(groups)}
<nav aria-label="Contents"><ol>{contents}</ol></nav>
<main>{body}</main>
<footer>Made by <code>metawrap report</code>, version {escape(__version__)}; charts by plotly.js, inside this file.
</footer>
<script>{library}</script>
<script>{script}</script>
</body>
</html>
"""


def _sections(groups: Sequence[Group]) -> list[Section]:
    several = any(len(group.runs) > 1 for group in groups)
    band = "the mean over seeds, with one standard deviation over them as band" if several else "the one seed"
    return [
        Section(
            "curves",
            "Training and validation",
            "Look whether the solid lines (validation, on classes that training never sees) follow the dotted ones "
            f"(training), and where they stop rising. Each line is {band}; training counts the epoch's own meta-steps, "
            "validation the same fixed tasks after each epoch, and the band of a single run is the 95 % interval over "
            "these tasks.",
            _panel("curves", curves(groups)),
        ),
        Section(
            "rates",
            "Learned inner rates",
            "Look at which layers are moved most in which inner step, and at points below the zero line: there "
            "the step climbs the support loss. Each point is the learned rate of one parameter tensor in one inner "
            "step after the epoch that the slider shows (of one rate per weight: their median).",
            _panel("rates", learned_rates(groups)),
            _lacking(groups, "rates", "its inner rates were not learned, or it takes no inner steps"),
        ),
        Section(
            "steps",
            "Accuracy after each inner step",
            "Look how much of the accuracy is there before adaptation (0 steps), and whether the last steps still add "
            f"to it. Each point is the best epoch's accuracy on the first {_tasks(groups)} test tasks after that many "
            "inner steps, under the run's own batch-norm policy; bars are 95 % intervals over tasks.",
            _panel("steps", accuracy_by_step(groups)),
            _without(groups, lambda run: bool(run.steps), "no final test was recorded, or it takes no inner steps"),
        ),
        Section(
            "msl",
            "Multi-step loss",
            "Look how the weight moves to the last step's loss, and whether the losses of the early steps stay close "
            "to it. Weights are those of the epoch's meta-loss; losses are means over the tasks of its meta-steps, "
            "and end where a step's weight is zero and its loss is not computed.",
            _panel("msl", step_losses(groups)),
            _lacking(groups, "step_weights", "its multi-step loss is off"),
        ),
        Section(
            "norms",
            "Batch norm, step by step",
            "Look whether the statistics differ between inner steps: where they do, one row for all steps would be "
            "wrong for each. A mark is the median over a layer's channels, its bar spans the quartiles; a norm that "
            "keeps one row for all steps has one mark.",
            _panel("norms", norm_statistics(groups)),
            _lacking(groups, "norms", "its network has no batch norm"),
        ),
        Section(
            "episodes",
            "Inside an episode",
            "Look at the targets that were taken for another class, and whether you would have confused them too. "
            "Shown are the first test task and the one with most errors, as the best epoch solves them; under each "
            "target are the predicted class and its softmax probability.",
            episodes(groups),
            _without(groups, lambda run: bool(run.episodes), "no episode was recorded"),
        ),
        Section(
            "results",
            "Final test",
            "Look at the row marked *, the batch-norm policy of training. Accuracies are on tasks of unseen classes, "
            "by the epoch with the best validation accuracy; transductive policies let a prediction depend on the "
            "other targets of its task.",
            words.final_table(groups),
            _without(groups, lambda run: bool(run.scores), "the final test has not been run"),
        ),
        Section(
            "command",
            "Command",
            "This makes the run again; paths are those of the machine that it ran on.",
            words.commands(groups),
        ),
        Section("settings", "Settings", "As they are stored with the runs.", words.settings(groups)),
        Section(
            "machine",
            "Machine",
            "Where training ran: timings depend on it, and the last bits of results too.",
            words.machines(groups),
            _without(groups, lambda run: bool(run.machine), "no result was recorded yet"),
        ),
    ]


def _section(section: Section) -> str:
    missing = f"<p class=missing>{section.missing}</p>" if section.missing else ""
    look = f"<p class=look>{section.look}</p>" if section.body else ""
    return f"<section id='{section.anchor}'><h2>{section.title}</h2>{look}{section.body}{missing}</section>"


def _panel(name: str, panel: ChartPanel | None) -> str:
    if panel is None:
        return ""
    charts = "".join(
        f"<figure>{f'<figcaption>{chart.title}</figcaption>' if chart.title else ''}"
        f"<div class=chart id='chart-{chart.name}'></div></figure>"
        for chart in panel.charts
    )
    return (
        f"<div class=panel id='panel-{name}'>{_controls(panel)}{_key(panel)}<div class=charts>{charts}</div>"
        f"<script type='application/json'>{as_json(asdict(panel))}</script></div>"
    )


def _controls(panel: ChartPanel) -> str:
    parts = []
    if len(panel.choices) > 1:
        options = "".join(f"<option value={place}>{escape(name)}</option>" for place, name in enumerate(panel.choices))
        parts.append(f"<label>run <select class=choice>{options}</select></label>")
    if any(len(names) > 1 for names in panel.slides):
        last = len(panel.slides[0]) - 1
        parts.append(
            "<button type=button class=play aria-label='play the epochs'>▶</button><label class=slide>epoch "
            f"<input class=slider type=range min=0 max={last} value={last} step=1><output></output></label>"
        )
    return f"<div class=controls>{''.join(parts)}</div>" if parts else ""


def _key(panel: ChartPanel) -> str:
    marks = (f"<span>{GLYPHS[step % len(GLYPHS)]} step {step + 1}</span>" for step in range(panel.key))
    return f"<p class=key>{' '.join(marks)}</p>" if panel.key else ""


def as_json(value: Any) -> str:
    """JSON that can stand in a script: no tag begins in it, and no NaN."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _lacking(groups: Sequence[Group], name: str, reason: str) -> str:
    """Which groups have none of it in any epoch, and why."""
    return _without(groups, lambda run: any(getattr(epoch, name) for epoch in run.epochs), reason)


def _without(groups: Sequence[Group], has: Any, reason: str) -> str:
    lacking = [group for group in groups if not any(has(run) for run in group.runs)]
    return " ".join(f"{escape(group.label)} is not shown: {_reason(group.runs, reason)}." for group in lacking)


def _reason(runs: Sequence[RunRecords], reason: str) -> str:
    if not any(run.epochs for run in runs):
        return "it has no finished epoch yet"
    if not any(run.has_insight for run in runs):
        return f"{reason}; or the run is from a version of metawrap that did not record it"
    return reason


def _tasks(groups: Sequence[Group]) -> str:
    counts = sorted({run.step_tasks for group in groups for run in group.runs if run.step_tasks})
    return " or ".join(map(str, counts)) or "few"


def _plotly() -> str:
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise MetaWrapError(
            f'report: the page needs plotly ({error}): pip install "metawrap[report]", then run the same command again.'
        ) from error
    # A script ends at the first such tag, even inside of a string.
    return str(get_plotlyjs()).replace("</script", "<\\/script")
