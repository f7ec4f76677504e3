"""The command line: flags -> RunSettings -> training, and errors -> one line with the fix.

Exit codes: 0 done, 1 an unexpected error, 2 an error that metawrap explains, 130 stopped by Ctrl-C or SIGTERM, 141 the
reader of the output is gone, as in `metawrap inspect ... | head`.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
import traceback
import warnings
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rich.console import Console

from metawrap.cli.arguments import build_parser
from metawrap.cli.classify import run_adapt, run_predict
from metawrap.cli.data_check import run_data_check
from metawrap.cli.flags_to_settings import flags_in, is_given, out_in, recipe_in, settings_in, starts_a_run
from metawrap.cli.output import show, silence, usable_streams, work_is_done
from metawrap.cli.serve import run_serve
from metawrap.errors import ArgumentError, MetaWrapError, RankError, printable, writing
from metawrap.learner.description import Description
from metawrap.recipes import Recipe, load_recipe, recipe_table, recipe_text
from metawrap.report import draw_report_pictures, gather, write_report_page
from metawrap.training.checkpoints import CheckpointFolder, write_json
from metawrap.training.comparison import compare, settings_by_method
from metawrap.training.inspection import inspect_model
from metawrap.training.machine import command_line, program
from metawrap.training.named_model import model_flag
from metawrap.training.progress import quiet, say, saying_logs
from metawrap.training.run import train, train_seeds
from metawrap.training.run_evaluation import evaluate_run
from metawrap.training.run_folder import read_run
from metawrap.training.study import run_study, study_table
from metawrap.training.tables import comparison_table, result_text
from metawrap.training.torchrun import on_rank_zero, process_group, rank, world_size

UNEXPECTED, FAILED, INTERRUPTED, UNREAD = 1, 2, 130, 141
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="color-scheme" content="light dark"><title>metawrap inspect</title></head>
<body style="margin: 2em; font-family: system-ui, sans-serif">{table}</body></html>
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit code; `argv` defaults to the arguments of the process.

    >>> main(["train", "--ways", "1"])
    2
    """
    parser = build_parser()
    if not (sys.argv[1:] if argv is None else argv):
        parser.print_help()
        return FAILED
    arguments = parser.parse_args(argv)
    command = _COMMANDS[arguments.command]
    with usable_streams(), _sigterm_interrupts(), _warnings_in_one_line(), saying_logs(), quiet(arguments.quiet):
        try:
            if world_size() > 1 and arguments.command != "train":
                raise ArgumentError(f"metawrap {arguments.command} runs in one process: start it without torchrun.")
            if (is_given(arguments, "model") or "source" in arguments) and os.getcwd() not in sys.path:
                # The name of a network finds a file in the current folder; nothing else is imported from there.
                sys.path.insert(0, os.getcwd())
            with process_group():
                command(arguments)
            sys.stdout.flush()
        except BrokenPipeError:
            silence(sys.stdout)
            return UNREAD
        except KeyboardInterrupt:
            say(_stopped(arguments), error=True)
            return INTERRUPTED
        except Exception as error:
            if arguments.verbose:
                with suppress(OSError):
                    print(printable(traceback.format_exc()), file=sys.stderr)
            _say_error(error)
            return FAILED if isinstance(error, MetaWrapError | OSError) else UNEXPECTED
    return 0


def _say_error(error: Exception) -> None:
    text = str(error)
    if isinstance(error, OSError) and not isinstance(error, MetaWrapError):
        place = "the output" if error.filename is None else f"'{error.filename}'"
        text = f"{place} cannot be used ({error.strerror or error}). Name another, or make room there."
        try:
            sys.stdout.flush()
        except OSError:
            silence(sys.stdout)
    elif not isinstance(error, MetaWrapError):
        text = f"unexpected {type(error).__name__}: {' '.join(text.split())}".rstrip(": .")
        text += ". This is a bug in metawrap or in a library: run again with -v for the traceback, and report it."
    if rank() == 0:
        say(f"Error: {text}", error=True)
    elif not isinstance(error, RankError):  # Rank 0 has printed the cause.
        print(f"Error on rank {rank()}: {text}", file=sys.stderr, flush=True)


def _train(arguments: Namespace) -> None:
    out, recipe = out_in(arguments), recipe_in(arguments)
    if recipe is not None and recipe.runs:
        return _study(arguments, recipe, out)
    stored = on_rank_zero(lambda: read_run(out) if arguments.resume and (out / "run.json").exists() else None)
    if arguments.resume and stored is None:
        if not starts_a_run(arguments):  # Most likely a slip in the name: a default run would train for minutes.
            read_run(out)
        say(f"There is no run in '{out}' yet: --resume starts one.")
    start, seeds = stored or (None, None)
    if stored is None and recipe is not None and not is_given(arguments, "seed"):
        seeds = None if recipe.seeds is None else list(recipe.seeds)
    settings, seeds = settings_in(arguments, start, recipe), arguments.seeds or seeds
    if seeds is None:
        result = train(settings, out, arguments.resume, arguments.tensorboard)
    else:
        result = train_seeds(settings, seeds, out, arguments.resume, arguments.tensorboard)
    if rank() == 0:
        with work_is_done(out / "result.json"):
            show(f"\n{result_text(result)}\n\nSettings, machine and result: {out / 'result.json'}")


def _study(arguments: Namespace, recipe: Recipe, out: Path) -> None:
    if world_size() > 1:
        raise ArgumentError("metawrap train on a study starts processes of its own: start it without torchrun.")
    if is_given(arguments, "method"):
        raise ArgumentError("method: is what a study compares. Leave it out, or train one of its runs.")
    experiments = {Path(each.name).stem: settings_in(arguments, None, each) for each in recipe.runs}
    seeds = arguments.seeds or (None if is_given(arguments, "seed") else recipe.seeds)
    seeds = seeds or [each.seed for each in experiments.values()][:1]
    _show_study(run_study(recipe.name, experiments, seeds, out, arguments.resume), out)


def _show_study(study: dict[str, Any], out: Path) -> None:
    with work_is_done(out / "study.md"):
        show(f"\n{study_table(study['runs'])}\n\nTable, figures and plot: {out / 'study.md'}")


def _recipes(arguments: Namespace) -> None:
    show(recipe_table() if arguments.name is None else recipe_text(load_recipe(arguments.name)))


def _compare(arguments: Namespace) -> None:
    overrides: dict[str, dict[str, Any]] = {}
    for method, name, value in getattr(arguments, "overrides", []):
        overrides.setdefault(method, {})[name] = value
    runs = settings_by_method(arguments.methods, settings_in(arguments), arguments.budget, overrides)
    if arguments.seeds:
        out = Path(arguments.out)
        return _show_study(run_study("comparison", runs, arguments.seeds, out, resume=True, jobs=arguments.jobs), out)
    result = compare(runs, arguments.out, arguments.jobs)
    table = Path(arguments.out) / "comparison.md"
    with work_is_done(table):
        show(f"\n{comparison_table(result['rows'])}\n\nTable, figures and plot: {table}")


def _evaluate(arguments: Namespace) -> None:
    chosen = {"part": arguments.part, **flags_in(arguments)}
    result = evaluate_run(arguments.run, arguments.norms, arguments.new_classes, **chosen)
    if arguments.out is None:
        show(f"\n{result_text(result)}")
        return
    write_json(Path(arguments.out), result)
    with work_is_done(Path(arguments.out)):
        show(f"\n{result_text(result)}")


def _inspect(arguments: Namespace) -> None:
    description = inspect_model(settings_in(arguments), arguments.input_shape)
    if arguments.html is not None:
        _write_page(Path(arguments.html), description)
    if arguments.json:
        print(json.dumps(description.to_dict(), indent=2))
    else:
        console = Console()
        (console.print if console.is_terminal else print)(description)


def _write_page(path: Path, description: Description) -> None:
    page = _PAGE.format(table=description._repr_html_())
    with writing("html", path):
        path.write_text(page, encoding="utf-8")


def _report(arguments: Namespace) -> None:
    groups = gather([Path(run) for run in arguments.runs])
    page = Path(arguments.out) if arguments.out is not None else Path(arguments.runs[0]) / "report.html"
    write_report_page(groups, page)
    pictures = draw_report_pictures(groups, Path(arguments.png)) if arguments.png is not None else []
    with work_is_done(page):
        show("\n".join([f"Report: {page}", *(f"Picture: {path}" for path in pictures)]))


_COMMANDS = {
    "train": _train,
    "compare": _compare,
    "evaluate": _evaluate,
    "adapt": run_adapt,
    "predict": run_predict,
    "serve": run_serve,
    "inspect": _inspect,
    "report": _report,
    "data": run_data_check,
    "recipes": _recipes,
}


def _stopped(arguments: Namespace) -> str:
    if arguments.command == "compare":
        return f"Stopped. Finished epochs are saved; continue with the same command: {command_line()}"
    if arguments.command != "train":
        return "Stopped."
    out = out_in(arguments)
    if not (out / "run.json").exists():
        if any(out.glob("*/run.json")):  # A study.
            return f"Stopped. Finished epochs are saved; continue with the same command and --resume: {command_line()}"
        return "Stopped before the first meta-step; nothing was written."
    settings, seeds = read_run(out)
    finished = max(CheckpointFolder(out / "checkpoints", 1, 1).epochs(), default=0)
    saved = "Finished epochs are saved" if seeds else f"{finished} of {settings.epochs} epochs are saved"
    command = f"{program()} train --out {shlex.quote(str(out))} --resume{model_flag(settings)}"
    return f"Stopped. {saved}; continue with: {command}"


@contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """Lets SIGTERM, which job schedulers send before SIGKILL, stop a run as Ctrl-C does.

    Only the first interrupt counts: torchrun sends SIGTERM after a Ctrl-C that has reached the processes already.
    """

    def interrupt(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise KeyboardInterrupt

    # A background job of a shell ignores Ctrl-C and keeps ignoring it.
    numbers = [signal.SIGTERM]
    numbers += [signal.SIGINT] if signal.getsignal(signal.SIGINT) is signal.default_int_handler else []
    try:
        before = {number: signal.signal(number, interrupt) for number in numbers}
    except ValueError:  # Only the main thread may set handlers.
        yield
        return
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _warnings_in_one_line() -> Iterator[None]:
    """Prints a warning as one plain line, without its place in the source of metawrap."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: say(f"Warning: {message}")
        yield
