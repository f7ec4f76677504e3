"""Results as aligned tables for the terminal."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from metawrap.training.run_settings import METHODS, RunSettings

_KINDS = {"batch": "transductive", "running": "inductive", "support": "inductive"}
_METHODS = {"maml++": "MAML++", "fomaml": "First-order MAML"}
_COLUMNS = {"before": "before adaptation", "after": "after adaptation", "ensemble": "best averaged"}


def result_text(result: dict[str, Any]) -> str:
    """The table of what `train`, `train_seeds` or `evaluate_run` returned, or of a result.json."""
    settings = RunSettings.from_dict(result["settings"])
    if "summary" in result:
        return seeds_table(settings, result["summary"], result["trained_norm"])
    return result_table(settings, result["test"], result["trained_norm"])


def result_table(settings: RunSettings, test: dict[str, Any], trained_norm: str) -> str:
    """Accuracy before and after adaptation under each batch-norm policy, from what `final_test` returned."""
    columns = [name for name in _COLUMNS if all(name in scores for scores in test["norms"].values())]
    rows = [
        [
            _policy(norm, trained_norm),
            *(percent_pair(scores[name]["accuracy"], scores[name]["interval"]) for name in columns),
        ]
        for norm, scores in test["norms"].items()
    ]
    header = [_COLUMNS[name] for name in columns]
    if test["ensemble_epochs"]:
        header[-1] = f"{len(test['ensemble_epochs'])} {header[-1]}"
    return "\n".join(
        [
            f"{headline(settings)}: {test['tasks']} tasks of unseen classes, best epoch {test['epoch']} "
            f"of {settings.epochs}",
            "",
            render_table(["batch norm", *header], rows),
            "",
            f"± 95 % interval over tasks; chance is {100 / settings.ways:.0f} %; * the policy of training",
        ]
    )


def seeds_table(settings: RunSettings, summary: dict[str, Any], trained_norm: str) -> str:
    """Mean and standard deviation over seeds, from what `summarise_seeds` returned."""
    columns = [name for name in _COLUMNS if all(name in scores for scores in summary["norms"].values())]
    rows = [
        [
            _policy(norm, trained_norm),
            *(percent_pair(scores[name]["mean"], scores[name]["deviation"]) for name in columns),
        ]
        for norm, scores in summary["norms"].items()
    ]
    seeds = ", ".join(str(seed) for seed in summary["seeds"])
    return "\n".join(
        [
            f"{headline(settings)}: mean over seeds {seeds}",
            "",
            render_table(["batch norm", *(_COLUMNS[name] for name in columns)], rows),
            "",
            f"± standard deviation over seeds; chance is {100 / settings.ways:.0f} %; * the policy of training",
        ]
    )


def comparison_table(rows: Sequence[dict[str, Any]]) -> str:
    """A line for each method, the best first, as a table that is also Markdown; from what `compare` gathered."""
    header = ["method", "accuracy", "norm", "parameters", "s / meta-step", "peak MiB", "meta-steps", "minutes"]
    done = sorted((row for row in rows if row["error"] is None), key=lambda row: -row["accuracy"])
    cells = [
        [
            row["name"],
            percent_pair(row["accuracy"], row["interval"]),
            row["norm"],
            f"{row['parameters']:,}",
            f"{row['step_seconds']:.3f}",
            "unknown" if row["peak_mib"] is None else f"{row['peak_mib']:,.0f}",
            f"{row['meta_steps']:,}",
            f"{row['seconds'] / 60:.1f}",
        ]
        for row in done
    ]
    failed = [f"{row['name']} failed: {row['error']}" for row in rows if row["error"] is not None]
    if not done:
        return "\n".join(failed)
    settings = done[0]["settings"]
    title = f"{settings['data']}, {settings['ways']}-way {settings['shots']}-shot, test tasks: {settings['test_tasks']}"
    notes = ["± 95 % interval over tasks, in percent. Norm: the batch-norm policy of training and test."]
    return "\n".join([title, "", markdown_table(header, cells), "", *notes, *failed])


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """As `render_table`, in Markdown."""
    widths = [max(len(row[index]) for row in [header, *rows]) for index in range(len(header))]

    def line(row: Sequence[str]) -> str:
        first, *others = zip(row, widths, strict=True)
        return f"| {' | '.join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)])} |"

    rule = "|".join(["-" * (widths[0] + 2), *(f"{'-' * (width + 1)}:" for width in widths[1:])])
    return "\n".join([line(header), f"|{rule}|", *map(line, rows)])


def summarise_seeds(results: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """Over the results of `train` by seed.

    Returns:
        {"seeds", "norms": {norm: {"before" | "after" | "ensemble": {"mean", "deviation"}}}}; the deviation is that of a
        sample (n - 1), None for a single seed.
    """
    tests = [result["test"]["norms"] for result in results.values()]
    norms = {
        norm: {
            name: _mean_and_deviation([test[norm][name]["accuracy"] for test in tests])
            for name in scores
            if all(name in test[norm] for test in tests)
        }
        for norm, scores in tests[0].items()
    }
    return {"seeds": list(results), "norms": norms}


def headline(settings: RunSettings) -> str:
    """What is learned on what, such as 'MAML++ on glyphs, 5-way 1-shot'."""
    return f"{method_name(settings)} on {settings.data}, {settings.ways}-way {settings.shots}-shot"


def method_name(settings: RunSettings) -> str:
    """The method as people write it."""
    return method_title(settings.method)


def method_title(method: str) -> str:
    """A method's name on the command line as people write it; one that is not known stays as it is."""
    return _METHODS.get(method, METHODS.get(method, method))


def render_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns, the first to the left and the others to the right, with a line under the header."""
    widths = [max(len(row[index]) for row in [header, *rows]) for index in range(len(header))]

    def line(row: Sequence[str]) -> str:
        first, *others = zip(row, widths, strict=True)
        return "  ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]).rstrip()

    return "\n".join([line(header), "  ".join("-" * width for width in widths), *map(line, rows)])


def _policy(norm: str, trained_norm: str) -> str:
    return f"{norm} ({_KINDS[norm]}){' *' if norm == trained_norm else ''}"


def percent_pair(accuracy: float, spread: float | None = None) -> str:
    """Fractions as '97.65 ± 0.05 %'."""
    return f"{100 * accuracy:.2f} %" if spread is None else f"{100 * accuracy:.2f} ± {100 * spread:.2f} %"


def _mean_and_deviation(values: list[float]) -> dict[str, float | None]:
    return {"mean": statistics.fmean(values), "deviation": statistics.stdev(values) if len(values) > 1 else None}
