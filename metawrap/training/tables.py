"""Results as aligned tables for the terminal and for Markdown."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from metawrap.layers.norm_policies import kind_of
from metawrap.training.run_settings import METHODS

_TITLES = {"maml++": "MAML++", "fomaml": "First-order MAML"}
_IN_LATEX = str.maketrans(
    {each: f"\\{each}" for each in "&%$#_{}"}
    | {"±": r"$\pm$", "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
)
_COLUMNS = {"before": "before adaptation", "after": "after adaptation", "ensemble": "best averaged"}


def result_text(result: dict[str, Any]) -> str:
    """Accuracy before and after adaptation under each batch-norm policy, from a result of `train` or `train_seeds`."""
    settings = result["settings"]
    if "summary" in result:
        tested, keys, spread = result["summary"], ("mean", "deviation"), "standard deviation over seeds"
        title = f"mean over seeds {', '.join(map(str, tested['seeds']))}"
    else:
        tested, keys, spread = result["test"], ("accuracy", "interval"), "95 % interval over tasks"
        kind = result.get("classes", "unseen classes")
        title = f"{tested['tasks']} tasks of {kind}, best epoch {tested['epoch']} of {settings['epochs']}"
    columns = [name for name in _COLUMNS if all(name in scores for scores in tested["norms"].values())]
    header = [_COLUMNS[name] for name in columns]
    if averaged := tested.get("ensemble_epochs"):
        header[-1] = f"{len(averaged)} {header[-1]}"
    rows = [
        [_policy(norm, result["trained_norm"]), *(score_text(scores[name], *keys) for name in columns)]
        for norm, scores in tested["norms"].items()
    ]
    chance = f"chance is {100 / settings['ways']:.0f} %; " if "ways" in settings else ""
    notes = f"± {spread}; {chance}* the policy of training"
    own = tested["norms"].get(result["trained_norm"], {}).get("after", {}).get("metrics", {})
    if found := ", ".join(f"{name} {value:.4g}" for name, value in own.items() if value is not None):
        notes += f"\nUnder it, after adaptation: {found}"
    if words := result.get("tested"):
        title += f"\nTested: {words}"
    after = {norm: scores["after"] for norm, scores in tested["norms"].items() if "after" in scores}
    bounds = {norm: both for norm, score in after.items() if (both := _bounds(score, *keys))}
    if "ways" in settings:
        notes += _hint(bounds, result["trained_norm"], 1 / settings["ways"])
    return "\n".join([f"{headline(settings)}: {title}", "", render_table(["batch norm", *header], rows), "", notes])


def _bounds(score: Mapping[str, Any], value: str, spread: str) -> tuple[float, float] | None:
    """The lowest and highest likely accuracy; None where there is no accuracy."""
    middle, width = score.get(value), score.get(spread) or 0.0
    return None if middle is None else (middle, middle) if math.isnan(width) else (middle - width, middle + width)


def _hint(bounds: Mapping[str, tuple[float, float]], trained: str, chance: float) -> str:
    """A line about a policy that is weak, at most 80 characters; empty where all is well.

    The policy of training is weak if it may be at chance, or if another is certainly better. A transductive policy is
    not compared with an inductive one. Another policy is weak if that of training is certainly ten points better.
    """
    own = bounds.get(trained)
    if own is None:
        return ""
    if own[0] <= 1.1 * chance:
        return f"\nHint: {trained} may be at chance: train longer, or try another --meta-lr."
    others = {norm: found for norm, found in bounds.items() if norm != trained}
    fair = [norm for norm in others if kind_of(norm) == "inductive" or kind_of(trained) == "transductive"]
    best = max(fair, key=lambda norm: others[norm][0], default=trained)
    if best != trained and others[best][0] > own[1]:
        return f"\nHint: {best} is better than {trained}. Train with it: --norm {best}"
    worst = min(others, key=lambda norm: others[norm][1], default=trained)
    if worst != trained and others[worst][1] < own[0] - 0.1:
        return f"\nHint: {worst} is far below {trained}: predict under {trained}, as in training."
    return ""


_COMPARED = ["method", "accuracy", "norm", "parameters", "s / meta-step", "peak MiB", "meta-steps", "minutes"]


def comparison_cells(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """The header, and a line of cells per method that was trained, the best first, from the rows of `compare`."""
    done = [row for row in rows if row["error"] is None]
    done.sort(key=lambda row: row["loss"] if row["accuracy"] is None else -row["accuracy"])
    cells = [
        [
            row["name"],
            score_text(row, "accuracy", "interval"),
            row["norm"],
            f"{row['parameters']:,}",
            f"{row['step_seconds']:.3f}",
            "unknown" if row["peak_mib"] is None else f"{row['peak_mib']:,.0f}",
            f"{row['meta_steps']:,}",
            f"{row['seconds'] / 60:.1f}",
        ]
        for row in done
    ]
    return [_COMPARED, *cells]


def comparison_table(rows: Sequence[dict[str, Any]]) -> str:
    """The table of `comparison_cells` in Markdown; failures stand below."""
    done = [row for row in rows if row["error"] is None]
    failed = [f"{row['name']} failed: {row['error']}" for row in rows if row["error"] is not None]
    if not done:
        return "\n".join(failed)
    title = f"{task_name(done[0]['settings'])}, test tasks: {done[0]['settings']['test_tasks']}"
    note = "± 95 % interval over tasks, in percent. Norm: the batch-norm policy of training and test."
    header, *cells = comparison_cells(rows)
    return "\n".join([title, "", markdown_table(header, cells), "", note, *failed])


def summarise_seeds(results: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """Mean and deviation over the results of `train`, given by seed.

    Returns:
        {"seeds", "norms": {norm: {"before" | "after" | "ensemble": {"mean", "deviation"}}}}. The deviation is that of a
        sample (n - 1); None for one seed.
    """
    tests = [result["test"]["norms"] for result in results.values()]
    norms = {
        norm: {
            name: _mean_and_deviation([test[norm][name] for test in tests])
            for name in scores
            if all(name in test[norm] for test in tests)
        }
        for norm, scores in tests[0].items()
    }
    return {"seeds": list(results), "norms": norms}


def render_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns, the first to the left and the others to the right, with a line under the header.

    >>> print(render_table(["norm", "accuracy"], [["batch", "9 %"], ["running", "99 %"]]))
    norm     accuracy
    -------  --------
    batch         9 %
    running      99 %
    """
    widths, lines = _padded(header, rows)
    first, *others = ["  ".join(line).rstrip() for line in lines]
    return "\n".join([first, "  ".join("-" * width for width in widths), *others])


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The table of `render_table` in Markdown."""
    widths, lines = _padded(header, rows)
    first, *others = [f"| {' | '.join(line)} |" for line in lines]
    rule = "|".join(["-" * (widths[0] + 2), *(f"{'-' * (width + 1)}:" for width in widths[1:])])
    return "\n".join([first, f"|{rule}|", *others])


def latex_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The table of `render_table` for LaTeX with the package booktabs.

    >>> print(latex_table(["norm", "accuracy"], [["batch", "99 ± 1 %"]]).splitlines()[4])
    batch & 99 $\\pm$ 1 \\% \\\\
    """
    first, *others = [" & ".join(cell.translate(_IN_LATEX) for cell in line) + r" \\" for line in (header, *rows)]
    columns = "l" + "r" * (len(header) - 1)
    begin, end = rf"\begin{{tabular}}{{{columns}}}", r"\end{tabular}"
    return "\n".join([begin, r"\toprule", first, r"\midrule", *others, r"\bottomrule", end, ""])


def csv_table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """These columns of the rows as CSV, numbers in full; what a row lacks is empty."""
    file = io.StringIO()
    writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def headline(settings: Mapping[str, Any]) -> str:
    """Method and task, such as 'MAML++ on glyphs, 5-way 1-shot'."""
    return f"{method_title(settings['method'])} on {task_name(settings)}"


def task_name(settings: Mapping[str, Any]) -> str:
    """Data and size of a task, such as 'glyphs, 5-way 1-shot'; the size is not known of tasks of the user's own."""
    size = f", {settings['ways']}-way {settings['shots']}-shot" if "ways" in settings else ""
    return f"{settings['data']}{size}"


def method_title(method: str) -> str:
    """A method's published name from its name on the command line; an unknown name stays as it is."""
    return _TITLES.get(method, METHODS.get(method, method))


def percent_pair(accuracy: float, spread: float | None = None) -> str:
    """Fractions as '97.65 ± 0.05 %'; the spread of one task or seed is None or NaN, and left out."""
    if spread is None or math.isnan(spread):
        return f"{100 * accuracy:.2f} %"
    return f"{100 * accuracy:.2f} ± {100 * spread:.2f} %"


def score_text(score: Mapping[str, Any], value: str, spread: str) -> str:
    """The accuracy in percent; of a run whose labels give none, the loss."""
    return percent_pair(score[value], score[spread]) if score[value] is not None else f"loss {score['loss']:.4g}"


def _padded(header: Sequence[str], rows: Sequence[Sequence[str]]) -> tuple[list[int], list[list[str]]]:
    """The width of each column, and the header and rows with every cell padded to its column's width."""
    lines = [header, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    first, *others = widths
    return widths, [[line[0].ljust(first), *map(str.rjust, line[1:], others)] for line in lines]


def _policy(norm: str, trained_norm: str) -> str:
    return f"{norm} ({kind_of(norm)}){' *' if norm == trained_norm else ''}"


def _mean_and_deviation(scores: list[dict[str, Any]]) -> dict[str, float | None]:
    values = [score["accuracy"] for score in scores]
    if None in values:
        return {"mean": None, "deviation": None, "loss": statistics.fmean(score["loss"] for score in scores)}
    return {"mean": statistics.fmean(values), "deviation": statistics.stdev(values) if len(values) > 1 else None}
