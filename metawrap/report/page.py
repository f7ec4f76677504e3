"""Groups of runs -> one HTML file that needs no network.

A section of the page has a title, a hint for the reader, and its content. `page.html` turns sections into markup.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from metawrap import __version__
from metawrap.errors import MetaWrapError, writing
from metawrap.report import tables
from metawrap.report.charts import SYMBOLS, accuracy_by_step, curves, step_losses
from metawrap.report.class_charts import by_class, embeddings
from metawrap.report.gather import Group, recorded
from metawrap.report.layer_charts import learned_rates, norm_statistics
from metawrap.report.records import RunRecords
from metawrap.templates import fill_template, packaged_text
from metawrap.training.checkpoints import write_atomically

_PACKAGE = "metawrap.report"


@dataclass(frozen=True)
class Section:
    """A part of the page, left out if no run has its content.

    look: the hint for the reader. content: a panel of charts or a table. lacking: groups without it. reason: why.
    """

    anchor: str
    title: str
    look: str
    content: Any
    lacking: Sequence[Group] = ()
    reason: str = ""


def write_report_page(groups: Sequence[Group], path: Path) -> None:
    """Writes the page.

    >>> write_report_page(gather([Path("runs/one")]), Path("report.html"))  # doctest: +SKIP

    Raises:
        ArgumentError: the file cannot be written.
        MetaWrapError: plotly is not installed.
    """
    page = render(groups, plotly_library())
    with writing("out", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda handle: handle.write(page.encode("utf-8", "replace")))


def render(groups: Sequence[Group], library: str) -> str:
    """The page as HTML, with this text as the script that draws charts."""
    sections = _sections(groups)
    return fill_template(
        _PACKAGE,
        "page.html",
        title=" and ".join(group.label for group in groups[:3]) + (" and more" if len(groups) > 3 else ""),
        folders=list(dict.fromkeys(str(run.path) for group in groups for run in group.runs)),
        cards=tables.cards(groups),
        sections=[section for section in sections if section.content],
        missing=_missing(groups, sections),
        image_source=tables.image_source,
        letters=SYMBOLS,
        version=__version__,
        # These three are metawrap's and plotly's own files, so they are not escaped.
        style=Markup(packaged_text(_PACKAGE, "page.css")),
        script=Markup(packaged_text(_PACKAGE, "page.js")),
        library=Markup(library),
    )


def plotly_library() -> str:
    """The text of plotly.js.

    Raises:
        MetaWrapError: plotly is not installed.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise MetaWrapError(
            f'report: the page needs plotly ({error}): pip install "metawrap[report]", then run the same command again.'
        ) from error
    # A browser ends a script at the first such tag, even inside a string.
    return str(get_plotlyjs()).replace("</script", "<\\/script")


def _sections(groups: Sequence[Group]) -> list[Section]:
    several = any(len(group.runs) > 1 for group in groups)
    spread = "Each line is the mean over seeds, with one standard deviation over them as band"
    band = spread if several else "Each line is one run"
    counts = sorted({run.step_tasks for group in groups for run in group.runs if run.step_tasks})
    tasks = " or ".join(map(str, counts)) or "few"
    has_steps = any(recorded(run, "step_losses") or run.steps for group in groups for run in group.runs)

    def section(
        anchor: str, title: str, look: str, content: Any, has: Callable[[RunRecords], object], reason: str
    ) -> Section:
        lacking = [group for group in groups if not any(has(run) for run in group.runs)]
        return Section(anchor, title, look, content, lacking, reason)

    return [
        Section(
            "curves",
            "Training and validation",
            "Look whether the solid lines (validation, on classes that training never sees) follow the dotted ones "
            f"(training), and where they stop rising. {band}; training counts the epoch's own meta-steps, "
            "validation the same fixed tasks after each epoch, and the band of a single run is the 95 % interval over "
            "these tasks.",
            curves(groups),
        ),
        section(
            "classes",
            "Accuracy and confusions by class",
            "Look at the classes with the lowest accuracy, and at what they are taken for: such pairs may need more "
            "images, or may be one class. Counts are those of the best epoch, on the targets of the first "
            f"{tasks} test tasks. A confusion counts against the targets of tasks that have both classes.",
            by_class(groups),
            lambda run: run.right,
            "no test by class was recorded",
        ),
        section(
            "embedding",
            "Embedding",
            "Look whether targets lie near the support examples of their class, and whether classes lie apart. The "
            "plane shows the two principal components of one test task's embeddings; classes that overlap here can be "
            "apart in the components that are not shown.",
            embeddings(groups),
            lambda run: any(episode.shares for episode in run.episodes),
            "its method does not fit a head to embeddings",
        ),
        section(
            "rates",
            "Learned inner rates",
            "Look at which layers are moved most in which inner step, and at points below the zero line: there "
            "the step climbs the support loss. Each point is the learned rate of one parameter tensor in one inner "
            "step after the epoch that the slider shows (of one rate per weight: their median).",
            learned_rates(groups),
            lambda run: recorded(run, "rates"),
            "its inner rates were not learned, or it takes no inner steps",
        ),
        section(
            "steps",
            "Accuracy after each inner step",
            "Look how much of the accuracy is there before adaptation (0 steps), and whether the last steps still add "
            f"to it. Each point is the best epoch's accuracy on the first {tasks} test tasks after that many "
            "inner steps, under the run's own batch-norm policy; bars are 95 % intervals over tasks.",
            accuracy_by_step(groups),
            lambda run: run.steps,
            "no final test was recorded, or it takes no inner steps",
        ),
        section(
            "msl",
            "Multi-step loss",
            "Look how the weight moves to the last step's loss, and whether the losses of the early steps stay close "
            "to it. Weights are those of the epoch's meta-loss; losses are means over the tasks of its meta-steps, "
            "and end where a step's weight is zero and its loss is not computed.",
            step_losses(groups),
            lambda run: recorded(run, "step_weights"),
            "its multi-step loss is off",
        ),
        section(
            "norms",
            "Batch norm, step by step" if has_steps else "Batch norm",
            "Look whether the statistics settle, and whether a layer's scale goes to zero: such a layer is switched "
            "off. A mark is the median over a layer's channels, and its bar spans the quartiles."
            if not has_steps
            else "Look whether the statistics differ between inner steps: where they do, one row for all steps would "
            "be wrong for each. A mark is the median over a layer's channels, its bar spans the quartiles; a norm that "
            "keeps one row for all steps has one mark.",
            norm_statistics(groups),
            lambda run: recorded(run, "norms"),
            "its network has no batch norm",
        ),
        section(
            "episodes",
            "Inside an episode",
            "Look at the targets that were taken for another class, and whether you would have confused them too. "
            "Shown are the first test task and the one with most errors, as the best epoch solves them; under each "
            "target are the predicted class and its softmax probability.",
            tables.episodes(groups),
            lambda run: run.episodes,
            "no episode was recorded",
        ),
        section(
            "results",
            "Final test",
            "Look at the row marked *, the batch-norm policy of training. Accuracies are on tasks of unseen classes, "
            "by the epoch with the best validation accuracy; transductive policies let a prediction depend on the "
            "other targets of its task.",
            tables.final_table(groups),
            lambda run: run.scores,
            "the final test has not been run",
        ),
        Section(
            "command",
            "Command",
            "This makes the run again; paths are those of the machine that it ran on.",
            tables.commands(groups),
        ),
        Section("settings", "Settings", "As they are stored with the runs.", tables.settings(groups)),
        section(
            "machine",
            "Machine",
            "Where training ran: timings depend on it, and the last bits of results too.",
            tables.machines(groups),
            lambda run: run.machine,
            "no result was recorded yet",
        ),
    ]


def _missing(groups: Sequence[Group], sections: Sequence[Section]) -> dict[str, list[tuple[str, str]]]:
    """For each group, the sections without it and why; or one reason for all, with no section."""
    found: dict[str, list[tuple[str, str]]] = {}
    for group in groups:
        lacking = [(each.title, each.reason) for each in sections if group in each.lacking]
        if not any(run.epochs for run in group.runs):
            lacking = [("", "It has no finished epoch yet.")]
        elif not any(run.has_insight for run in group.runs):
            lacking = [("", "The run is from a version of metawrap that recorded less.")]
        if lacking:
            found[group.label] = lacking
    return found
