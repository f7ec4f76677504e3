"""The flags of the command line, and how each is read. A flag that is not given leaves no value behind."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any, NoReturn

from metawrap import __version__
from metawrap.cli.data_check import add_data_command
from metawrap.cli.report import add_report
from metawrap.training.run_settings import BACKBONES, METHODS, NORMS

# Named at the end of the help alone, which is to fit on a screen.
_RARE = argparse.SUPPRESS


def build_parser() -> argparse.ArgumentParser:
    """The parser of `metawrap`; settings that were not given are absent from the namespace."""
    parser = _Parser(prog="metawrap", description="Meta-learning for any PyTorch network.", formatter_class=_Formatter)
    parser.add_argument("--version", action="version", version=f"metawrap {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    _add_train(commands)
    _add_compare(commands)
    _add_evaluate(commands)
    _add_inspect(commands)
    add_report(commands, _Formatter, _add_terminal_flags)
    add_data_command(commands, _Formatter, _add_terminal_flags)
    _add_recipes(commands)
    parser.commands = commands.choices
    return parser


class _Formatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32, width=100)


class _Parser(argparse.ArgumentParser):
    """One line for an error, with the nearest flag for one that does not exist."""

    commands: Mapping[str, argparse.ArgumentParser] = {}

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        arguments, unknown = super().parse_known_args(args, namespace)
        if unknown and self.commands:  # Of the whole line; the parser of a command hands on what it does not know.
            command = self.commands.get(getattr(arguments, "command", ""), self)
            flag = unknown[0].partition("=")[0]
            close = get_close_matches(flag, re.findall(r"--[a-z][a-z-]*", command.format_help()), 1)
            fix = f"Did you mean {close[0]}?" if close else f"See {command.prog} --help."
            self.exit(2, f"Error: {command.prog} has no '{flag}'. {fix}\n")
        return arguments, unknown

    def error(self, message: str) -> NoReturn:
        if given := re.fullmatch(r"(?:argument )?(.*): invalid choice: '([^']*)' \(choose from (.*)\)", message):
            close = get_close_matches(given[2], re.findall(r"[\w+-]+", given[3]), 1)
            if close:
                self.exit(2, f"Error: {given[1]}: invalid choice '{given[2]}'. Did you mean {close[0]}?\n")
        self.exit(2, f"Error: {message.rstrip('.')}. See {self.prog} --help.\n")


def _add_train(commands: Any) -> None:
    parser = commands.add_parser(
        "train",
        help="meta-train, validate and test a network",
        usage="metawrap train [options]",
        epilog="Rarer: --split NAME, --train-ways N, --keep N, --test-norms all|own (docs/recipes.md);\n"
        "--normalise imagenet|none, --stream, --no-stream, --loader-workers N (docs/data.md).\n"
        "In N processes: torchrun --nproc-per-node=N -m metawrap train [options]",
        formatter_class=_Formatter,
        argument_default=argparse.SUPPRESS,
        add_help=False,
    )
    recipes = parser.add_argument_group("recipe")
    recipes.add_argument("--recipe", metavar="NAME", help="a published experiment (metawrap recipes), or a file.yaml")
    _add_set(recipes)
    _add_data_flags(parser.add_argument_group("data"))
    _add_method_flags(parser.add_argument_group("method"))
    _add_run_flags(parser.add_argument_group("run"))
    _add_terminal_flags(parser)


def _add_compare(commands: Any) -> None:
    parser = commands.add_parser(
        "compare",
        help="train and test several methods on the same tasks",
        usage="metawrap compare --methods NAME,NAME --budget N [options]",
        epilog="Rarer: --split NAME, --train-ways N; see docs/recipes.md.\n"
        "Writes comparison.md, .json and .png; the same command continues one that was stopped.",
        formatter_class=_Formatter,
        argument_default=argparse.SUPPRESS,
        add_help=False,
    )
    group = parser.add_argument_group("methods")
    group.add_argument("--methods", type=_names, required=True, metavar="NAME,NAME", help=", ".join(METHODS))
    group.add_argument("--budget", type=int, required=True, metavar="N", help="meta-steps of each method")
    group.add_argument(
        "--set",
        dest="overrides",
        action="append",
        type=_override,
        default=[],
        metavar="METHOD.NAME=VALUE",
        help="of one method: its budget, a setting or a keyword",
    )
    group.add_argument(
        "--norm", choices=NORMS, metavar="NAME", help="one batch-norm policy for all (each method's own)"
    )
    _add_data_flags(parser.add_argument_group("data"))
    _add_network_flags(parser.add_argument_group("network"))
    group = parser.add_argument_group("run")
    group.add_argument("--epochs", type=int, metavar="N", help="validations, in equal parts of the budget (10)")
    _add_task_flags(group)
    group.add_argument("--seed", type=int, metavar="N", help="of the initial weights and the order of tasks (0)")
    group.add_argument("--device", metavar="NAME", help="auto (default), cpu, cuda, cuda:1")
    group.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time, which share the cores (1)")
    group.add_argument("--out", default="runs/compare", metavar="PATH", help="a folder per method (runs/compare)")
    _add_terminal_flags(parser)


def _add_data_flags(group: Any) -> None:
    group.add_argument("--data", metavar="NAME", help="glyphs (default), omniglot, ..., or a folder of class folders")
    group.add_argument(
        "--data-root", metavar="PATH", help="its folder or archive; omniglot and CIFAR are downloaded if missing"
    )
    group.add_argument("--split", metavar="NAME", help=_RARE)
    group.add_argument("--image-size", type=int, metavar="N", help="side in pixels (the data set's: 28, 32 or 84)")
    group.add_argument(
        "--rotations",
        action=argparse.BooleanOptionalAction,
        help="turned images as new classes (default: on for omniglot)",
    )
    group.add_argument("--normalise", metavar="NAME", help=_RARE)
    group.add_argument("--stream", action=argparse.BooleanOptionalAction, help=_RARE)
    group.add_argument("--loader-workers", type=int, metavar="N", help=_RARE)
    group.add_argument("--ways", type=int, metavar="N", help="classes per task (5)")
    group.add_argument("--train-ways", type=int, metavar="N", help=_RARE)
    group.add_argument("--shots", type=int, metavar="N", help="support images per class (1)")
    group.add_argument("--targets", type=int, metavar="N", help="target images per class (1)")


def _add_method_flags(group: Any) -> None:
    _add_learner_flags(group)
    _add_network_flags(group)


def _add_network_flags(group: Any) -> None:
    group.add_argument("--backbone", choices=BACKBONES, metavar="NAME", help="conv4 (default) or conv4-strided")
    group.add_argument("--filters", type=int, metavar="N", help="channels of the backbone (64)")
    _add_model(group)


def _add_learner_flags(group: Any) -> None:
    listed = "maml++ (default); metawrap compare --help lists all"
    group.add_argument("--method", choices=tuple(METHODS), metavar="NAME", help=listed)
    group.add_argument("--preset", metavar="NAME", help="authors_code (default) or paper")
    group.add_argument(
        "--norm", choices=NORMS, metavar="NAME", help="batch norm by batch, running or support (the method's)"
    )
    group.add_argument("--engine", metavar="NAME", help="auto (default), functional or higher")
    group.add_argument("--inner-steps", type=int, metavar="N", help="inner updates per task (the method's: 5)")
    group.add_argument("--inner-lr", type=float, metavar="X", help="first inner learning rate (0.1)")
    group.add_argument("--meta-lr", type=float, metavar="X", help="outer learning rate (the method's: 0.001)")


def _add_set(group: Any) -> None:
    group.add_argument(
        "--set",
        dest="options",
        action="append",
        type=_option,
        metavar="NAME=VALUE",
        help="any setting of a recipe or keyword of the method; wins over the recipe",
    )


def _add_model(group: Any, **options: Any) -> None:
    group.add_argument(
        "--model",
        metavar="MODULE:NAME",
        help="your own network: NAME() or NAME(ways=...) makes it",
        **options,
    )


def _add_run_flags(group: Any) -> None:
    group.add_argument("--epochs", type=int, metavar="N", help="epochs (10), each with validation and a checkpoint")
    group.add_argument(
        "--iterations", dest="iterations_per_epoch", type=int, metavar="N", help="meta-steps per epoch (50)"
    )
    _add_task_flags(group)
    seeds = group.add_mutually_exclusive_group()
    seeds.add_argument("--seed", type=int, metavar="N", help="of the initial weights and the order of tasks (0)")
    seeds.add_argument(
        "--seeds", type=_integers, default=None, metavar="N,N", help="a run each, with mean and deviation"
    )
    group.add_argument("--device", metavar="NAME", help="auto (default), cpu, cuda, cuda:1")
    group.add_argument("--out", default=None, metavar="PATH", help="the run's folder (runs/...)")
    group.add_argument(
        "--resume", action="store_true", default=False, help="continue the run in --out; flags may be left out"
    )
    group.add_argument("--keep", type=int, metavar="N", help=_RARE)
    group.add_argument("--ensemble", type=int, metavar="N", help="also test the N best averaged (the authors' code: 5)")
    group.add_argument("--test-norms", choices=("all", "own"), metavar="NAME", help=_RARE)
    group.add_argument(
        "--tensorboard",
        action="store_true",
        default=False,
        help="also log to PATH/tensorboard; kept up by --resume",
    )


def _add_task_flags(group: Any) -> None:
    group.add_argument("--batch", dest="tasks_per_batch", type=int, metavar="N", help="tasks per meta-step (8)")
    group.add_argument("--validation-tasks", type=int, metavar="N", help="fixed tasks to validate on (200)")
    group.add_argument("--test-tasks", type=int, metavar="N", help="fixed tasks of unseen classes to test on (600)")


def _add_evaluate(commands: Any) -> None:
    parser = commands.add_parser(
        "evaluate",
        help="test the best checkpoint of a run",
        usage="metawrap evaluate RUN [options]",
        formatter_class=_Formatter,
        argument_default=argparse.SUPPRESS,
        add_help=False,
    )
    parser.add_argument("run", metavar="RUN", help="a run's folder, finished or not")
    parser.add_argument("--tasks", dest="test_tasks", type=int, metavar="N", help="tasks of unseen classes (the run's)")
    parser.add_argument(
        "--norm",
        dest="norms",
        nargs="+",
        choices=NORMS,
        default=None,
        metavar="NAME",
        help="batch-norm policies (all three)",
    )
    parser.add_argument("--ensemble", type=int, metavar="N", help="also average the logits of the N best checkpoints")
    parser.add_argument("--data", metavar="NAME", help="test on another data set, with images of the same size")
    parser.add_argument("--data-root", metavar="PATH", help="its folder or archive")
    parser.add_argument("--device", metavar="NAME", help="auto, cpu, cuda, cuda:1 (the run's)")
    parser.add_argument("--out", default=None, metavar="FILE", help="also write the result as JSON")
    _add_terminal_flags(parser)


def _add_inspect(commands: Any) -> None:
    parser = commands.add_parser(
        "inspect",
        help="show what wrapping a network finds and does",
        usage="metawrap inspect --model MODULE:NAME [options]",
        formatter_class=_Formatter,
        argument_default=argparse.SUPPRESS,
        add_help=False,
    )
    _add_model(parser, required=True)
    _add_learner_flags(parser)
    _add_set(parser)
    parser.add_argument("--ways", type=int, metavar="N", help="classes of the network and of the task (5)")
    parser.add_argument(
        "--input-shape",
        type=_shape,
        default=None,
        metavar="C,H,W",
        help="of one example: a random task then shows head and engine",
    )
    parser.add_argument("--json", action="store_true", default=False, help="print JSON in place of a table")
    parser.add_argument("--html", default=None, metavar="FILE", help="also write the table as an HTML page")
    _add_terminal_flags(parser)


def _add_recipes(commands: Any) -> None:
    parser = commands.add_parser(
        "recipes",
        help="list the published experiments, or show one of them",
        usage="metawrap recipes [NAME]",
        epilog="To run one: metawrap train --recipe NAME [--set NAME=VALUE]",
        formatter_class=_Formatter,
        argument_default=argparse.SUPPRESS,
        add_help=False,
    )
    parser.add_argument("name", nargs="?", default=None, metavar="NAME", help="a recipe, or the path of a file.yaml")
    _add_terminal_flags(parser)


def _add_terminal_flags(parser: Any) -> None:
    group = parser.add_argument_group("terminal (NO_COLOR=1 turns colours off)")
    group.add_argument("-q", "--quiet", action="store_true", default=False, help="print errors and the result alone")
    group.add_argument("-v", "--verbose", action="store_true", default=False, help="show the traceback of an error")
    group.add_argument("-h", "--help", action="help", help="show this text")


def _integers(text: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected whole numbers such as 0,1,2, but got '{text}'") from None
    if len(set(numbers)) != len(numbers):
        raise argparse.ArgumentTypeError(f"expected different numbers, but got '{text}'")
    return numbers


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def _override(text: str) -> tuple[str, str, Any]:
    name, value = _option(text)
    method, separator, key = name.partition(".")
    if not separator:
        raise argparse.ArgumentTypeError(
            f"expected METHOD.NAME=VALUE, such as protonet.meta_lr=0.003, but got '{text}'"
        )
    return method, key, value


def _shape(text: str) -> tuple[int, ...]:
    try:
        shape = tuple(int(part) for part in text.split(","))
    except ValueError:
        shape = (0,)
    if min(shape) < 1:
        raise argparse.ArgumentTypeError(f"expected positive whole numbers such as 3,84,84, but got '{text}'")
    return shape


def _option(text: str) -> tuple[str, Any]:
    name, separator, value = text.partition("=")
    if not separator:
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, such as msl_epochs=15, but got '{text}'")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value
