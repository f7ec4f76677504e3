"""The parser of `metawrap`, and the flags of each command but those of classifiers."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any, NoReturn

from metawrap import __version__
from metawrap.cli.classifier_arguments import add_adapt, add_predict, add_serve
from metawrap.cli.flags import (
    DATA,
    DEVICE,
    FILE,
    LEARNER,
    MODEL,
    NAME,
    NETWORK,
    NORM,
    PATH,
    RARE,
    SEED,
    SEEDS,
    SET,
    SWITCH,
    TASKS,
    WEIGHTS,
    Formatter,
    N,
    add_flags,
    add_terminal,
    names,
    new_command,
    override,
    path,
    shape,
)
from metawrap.data import DATASETS
from metawrap.data.class_split import PARTS
from metawrap.training.run_settings import METHODS, nearest_method


def build_parser() -> argparse.ArgumentParser:
    """The parser of `metawrap`.

    >>> build_parser().parse_args(["train", "--ways", "20"]).ways
    20
    """
    parser = _Parser(prog="metawrap", description="Meta-learning for any PyTorch network.", formatter_class=Formatter)
    parser.add_argument("--version", action="version", version=f"metawrap {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    adders = _add_train, _add_compare, _add_evaluate, add_adapt, add_predict, add_serve, _add_inspect, _add_report
    for add in (*adders, _add_data_check, _add_recipes):
        add(commands)
    parser.commands = commands.choices
    return parser


class _Parser(argparse.ArgumentParser):
    """Prints an error on one line, with the most similar flag for an unknown one."""

    commands: Mapping[str, argparse.ArgumentParser] = {}

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        arguments, unknown = super().parse_known_args(args, namespace)
        if unknown and self.commands:  # The parser of a command hands unknown flags to the main parser.
            command = self.commands.get(getattr(arguments, "command", ""), self)
            flag = unknown[0].partition("=")[0]
            close = get_close_matches(flag, re.findall(r"--[a-z][a-z-]*", command.format_help()), 1)
            fix = f"Did you mean {close[0]}?" if close else f"See {command.prog} --help."
            self.exit(2, f"Error: {command.prog} has no '{flag}'. {fix}\n")
        return arguments, unknown

    def error(self, message: str) -> NoReturn:
        if given := re.fullmatch(r"(?:argument )?(.*): invalid choice: '([^']*)' \(choose from (.*)\)", message):
            alike = get_close_matches(given[2], re.findall(r"[\w+-]+", given[3]), 1)
            close = nearest_method(given[2]) if given[1] == "--method" else alike[0] if alike else None
            if close:
                self.exit(2, f"Error: {given[1]}: invalid choice '{given[2]}'. Did you mean {close}?\n")
        self.exit(2, f"Error: {message.rstrip('.')}. See {self.prog} --help.\n")


def _add_train(commands: Any) -> None:
    parser = new_command(
        commands,
        "train",
        "meta-train, validate and test a network",
        "train [options]",
        "Rarer: --split NAME, --train-ways N, --validation-alone N, --keep N, --test-norms all|own,\n"
        "--resize crop, --normalise imagenet|none, --stream, --no-stream, --loader-workers N (docs/data.md).\n"
        "In N processes: torchrun --nproc-per-node=N -m metawrap train [options]",
    )
    group = parser.add_argument_group("recipe")
    group.add_argument("--recipe", **NAME, help="a published experiment (metawrap recipes), or a file.yaml")
    group.add_argument("--set", **SET)
    add_flags(parser.add_argument_group("data"), DATA)
    add_flags(parser.add_argument_group("method"), LEARNER | NETWORK)
    group = parser.add_argument_group("run")
    group.add_argument("--epochs", **N, help="epochs (10), each with validation and a checkpoint")
    group.add_argument("--iterations", dest="iterations_per_epoch", **N, help="meta-steps per epoch (50)")
    add_flags(group, TASKS)
    either = group.add_mutually_exclusive_group()
    either.add_argument("--seed", **SEED)
    either.add_argument("--seeds", **SEEDS)
    group.add_argument("--device", **DEVICE)
    group.add_argument("--out", **PATH, help="the run's folder (runs/...)")
    group.add_argument("--resume", **SWITCH, help="continue the run in --out, or extend it by more --epochs")
    group.add_argument("--keep", **N, **RARE)
    group.add_argument("--ensemble", **N, help="also test the N best averaged (the authors' code: 5)")
    group.add_argument("--test-norms", choices=("all", "own"), **NAME, **RARE)
    group.add_argument("--tensorboard", **SWITCH, help="also log to PATH/tensorboard; kept up by --resume")
    add_terminal(parser)


def _add_compare(commands: Any) -> None:
    parser = new_command(
        commands,
        "compare",
        "train and test several methods on the same tasks",
        "compare --methods NAME,NAME --budget N [options]",
        "Rarer: --split NAME, --train-ways N; see docs/recipes.md.\n"
        "Writes comparison.md, .csv, .tex, .json and .png, with --seeds study.md, .csv and so on;\n"
        "the same command continues one that was stopped.",
    )
    group = parser.add_argument_group("methods")
    group.add_argument("--methods", type=names, required=True, metavar="NAME,NAME", help=", ".join(METHODS))
    group.add_argument("--budget", required=True, **N, help="meta-steps of each method")
    own = {"dest": "overrides", "type": override, "metavar": "METHOD.NAME=VALUE"}
    group.add_argument("--set", **SET | own | {"help": "of one method: its budget, a setting or a keyword"})
    group.add_argument("--norm", **NORM, help="one batch-norm policy for all (each method's own)")
    add_flags(parser.add_argument_group("data"), DATA)
    add_flags(parser.add_argument_group("network"), NETWORK)
    group = parser.add_argument_group("run")
    group.add_argument("--epochs", **N, help="validations, in equal parts of the budget (10)")
    add_flags(group, TASKS | {"--device": DEVICE})
    either = group.add_mutually_exclusive_group()
    either.add_argument("--seed", **SEED)
    either.add_argument("--seeds", **SEEDS)
    group.add_argument("--jobs", **N, default=1, help="runs at a time, which share the cores (1)")
    group.add_argument(
        "--out", type=path, metavar="PATH", default="runs/compare", help="a folder per method (runs/compare)"
    )
    add_terminal(parser)


def _add_evaluate(commands: Any) -> None:
    parser = new_command(commands, "evaluate", "test the best checkpoint of a run", "evaluate RUN [options]")
    parser.add_argument("run", type=path, metavar="RUN", help="a run's folder, finished or not")
    parser.add_argument("--tasks", dest="test_tasks", **N, help="tasks of unseen classes (the run's)")
    parser.add_argument(
        "--norm", dest="norms", nargs="+", default=None, **NORM, help="batch-norm policies (all that apply)"
    )
    parser.add_argument("--ensemble", **N, help="also average the logits of the N best checkpoints")
    parser.add_argument("--data", **NAME, help="test on another data set, with images of the same size")
    parser.add_argument("--data-root", type=path, metavar="PATH", help="its folder or archive")
    for name in ("--ways", "--shots", "--targets"):
        parser.add_argument(name, **DATA[name] | {"help": str(DATA[name]["help"]).partition(" (")[0] + " (the run's)"})
    about = "classes to test on: test (default), train, validation; all: no split, each must be new"
    parser.add_argument("--part", choices=("all", *PARTS), default="test", metavar="PART", help=about)
    about = "test on all classes that were in neither training nor validation, also later ones"
    parser.add_argument("--new-classes", **SWITCH, help=about)
    parser.add_argument("--model", **MODEL | {"help": "the run's own network, which no file is trusted to name"})
    parser.add_argument("--device", **NAME, help="auto, cpu, cuda, cuda:1 (the run's)")
    parser.add_argument("--out", **FILE, help="also write the result as JSON")
    add_terminal(parser)


def _add_inspect(commands: Any) -> None:
    parser = new_command(
        commands, "inspect", "show what wrapping a network finds and does", "inspect --model MODULE:NAME [options]"
    )
    parser.add_argument("--model", required=True, **MODEL)
    parser.add_argument("--weights", **WEIGHTS)
    add_flags(parser, LEARNER | {"--set": SET})
    parser.add_argument("--ways", **N, help="classes of the network and of the task (5)")
    about = "of one example: a random task then shows head and engine"
    parser.add_argument("--input-shape", type=shape, default=None, metavar="C,H,W", help=about)
    parser.add_argument("--json", **SWITCH, help="print JSON in place of a table")
    parser.add_argument("--html", **FILE, help="also write the table as an HTML page")
    add_terminal(parser)


def _add_report(commands: Any) -> None:
    parser = new_command(
        commands,
        "report",
        "show what runs have learned, in one HTML file",
        "report RUN [RUN ...] [options]",
        "Runs that differ in their seed alone are drawn as one; a run that still trains, as far as it is.",
    )
    about = "a run's folder, or a folder of such (seeds, a comparison)"
    parser.add_argument("runs", nargs="+", type=path, metavar="RUN", help=about)
    parser.add_argument("--out", **FILE, help="the page (report.html in the first run's folder)")
    parser.add_argument(
        "--png", type=path, metavar="DIR", default=None, help="also draw the main figures, as report-*.png there"
    )
    add_terminal(parser)


def _add_data_check(commands: Any) -> None:
    data = commands.add_parser("data", help="look at a data set", usage="metawrap data check PATH [options]")
    parser = new_command(
        data.add_subparsers(dest="data_command", required=True, metavar="check"),
        "check",
        "what is there, what is broken, and one episode as a picture",
        "data check PATH [options]",
        "Reads every image once. Exit code 2 if training would refuse something.",
    )
    parser.add_argument("path", type=path, metavar="PATH", help=f"a folder, a file, or a name: {', '.join(DATASETS)}")
    parser.add_argument("--data-root", **PATH, help="where the files of a named data set lie")
    parser.add_argument("--split", **NAME, help="as for train")
    parser.add_argument("--image-size", **N, help="side in pixels (the data set's own)")
    parser.add_argument("--ways", **N, default=5, help="classes of the episode (5)")
    parser.add_argument("--shots", **N, default=1, help="support images per class (1)")
    parser.add_argument("--targets", **N, default=3, help="target images per class (3)")
    parser.add_argument("--seed", **N, default=0, help="which episode (0)")
    parser.add_argument(
        "--out", type=path, metavar="FILE", default="contact-sheet.png", help="the picture (contact-sheet.png)"
    )
    parser.add_argument("--json", **SWITCH, help="print JSON in place of a table")
    add_terminal(parser)


def _add_recipes(commands: Any) -> None:
    parser = new_command(
        commands,
        "recipes",
        "list the published experiments, or show one of them",
        "recipes [NAME]",
        "To run one: metawrap train --recipe NAME [--set NAME=VALUE]",
    )
    parser.add_argument("name", nargs="?", default=None, **NAME, help="a recipe, or the path of a file.yaml")
    add_terminal(parser)
