"""The flags of the command line and their types. A setting that is not given is absent from the namespace."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any, NoReturn

from metawrap import __version__
from metawrap.data import DATASETS
from metawrap.data.class_split import PARTS
from metawrap.engines import ENGINES
from metawrap.training.run_settings import BACKBONES, METHODS, NORMS


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def _seeds(text: str) -> list[int]:
    numbers = _whole_numbers(text, 0, "whole numbers such as 0,1,2")
    if len(set(numbers)) != len(numbers):
        raise argparse.ArgumentTypeError(f"expected different numbers, but got '{text}'")
    return numbers


def _shape(text: str) -> tuple[int, ...]:
    return tuple(_whole_numbers(text, 1, "positive whole numbers such as 3,84,84"))


def _whole_numbers(text: str, least: int, expected: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < least:
        raise argparse.ArgumentTypeError(f"expected {expected}, but got '{text}'")
    return numbers


def _override(text: str) -> tuple[str, str, Any]:
    name, value = _option(text)
    method, separator, key = name.partition(".")
    if not separator:
        raise argparse.ArgumentTypeError(
            f"expected METHOD.NAME=VALUE, such as protonet.meta_lr=0.003, but got '{text}'"
        )
    return method, key, value


def _option(text: str) -> tuple[str, Any]:
    name, separator, value = text.partition("=")
    if not separator:
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, such as msl_epochs=15, but got '{text}'")
    try:
        return name, json.loads(value)
    except RecursionError:
        raise argparse.ArgumentTypeError(f"expected a plain value, but that of {name} is nested too deeply") from None
    except ValueError:
        return name, value


def _path(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("expected a path, but got ''")
    return text


_N: dict[str, Any] = {"type": int, "metavar": "N"}
_X: dict[str, Any] = {"type": float, "metavar": "X"}
_NAME: dict[str, Any] = {"metavar": "NAME"}
_PATH: dict[str, Any] = {"type": _path, "metavar": "PATH", "default": None}
_FILE: dict[str, Any] = {"type": _path, "metavar": "FILE", "default": None}
_SWITCH: dict[str, Any] = {"action": "store_true", "default": False}
_ON_OFF: dict[str, Any] = {"action": argparse.BooleanOptionalAction}
# Help fits on a screen, so its epilog alone names these flags.
_RARE = {"help": argparse.SUPPRESS}

# Flags that several commands share.
_DATA: dict[str, dict[str, Any]] = {
    "--data": _NAME | {"help": "glyphs (default), omniglot, ..., or a folder of class folders"},
    "--data-root": {
        "type": _path,
        "metavar": "PATH",
        "help": "its folder or archive; omniglot and CIFAR are downloaded if missing",
    },
    "--split": _NAME | _RARE,
    "--image-size": _N | {"help": "side in pixels (the data set's: 28, 32 or 84)"},
    "--resize": _RARE | {"choices": ("squeeze", "crop")},
    "--rotations": _ON_OFF | {"help": "turned images as new classes (default: on for omniglot)"},
    "--normalise": _NAME | _RARE,
    "--stream": _ON_OFF | _RARE,
    "--loader-workers": _N | _RARE,
    "--ways": _N | {"help": "classes per task (5)"},
    "--train-ways": _N | _RARE,
    "--shots": _N | {"help": "support images per class (1)"},
    "--targets": _N | {"help": "target images per class (1)"},
}
_NORM = {"choices": NORMS} | _NAME
_LEARNER: dict[str, dict[str, Any]] = {
    "--method": _NAME | {"choices": tuple(METHODS), "help": "maml++ (default); metawrap compare --help lists all"},
    "--preset": _NAME | {"help": "authors_code (default) or paper"},
    "--norm": _NORM | {"help": "batch norm: batch, running, support, task, task_layer (the method's)"},
    "--engine": _NAME | {"help": f"auto (default: chooses one), {', '.join(ENGINES)}"},
    "--inner-steps": _N | {"help": "inner updates per task (the method's: 5)"},
    "--inner-lr": _X | {"help": "first inner learning rate (0.1)"},
    "--meta-lr": _X | {"help": "outer learning rate (the method's: 0.001)"},
}
_MODEL = {"metavar": "MODULE:NAME", "help": "your network: NAME() or NAME(ways=...); or timm:NAME, hf:FOLDER"}
_WEIGHTS = {"metavar": "FILE", "help": "its weights: a file, or DEFAULT for the published ones (random)"}
_NETWORK: dict[str, dict[str, Any]] = {
    "--backbone": _NAME | {"choices": BACKBONES, "help": "conv4 (default) or conv4-strided"},
    "--filters": _N | {"help": "channels of the backbone (64)"},
    "--model": _MODEL,
    "--weights": _WEIGHTS,
}
_TASKS: dict[str, dict[str, Any]] = {
    "--batch": _N | {"dest": "tasks_per_batch", "help": "tasks per meta-step (8)"},
    "--validation-tasks": _N | {"help": "fixed tasks to validate on (200)"},
    "--validation-alone": _N | _RARE,
    "--test-tasks": _N | {"help": "fixed tasks of unseen classes to test on (600)"},
}
_SEED = _N | {"help": "of the initial weights and the order of tasks (0)"}
_SET = {"action": "append", "dest": "options", "type": _option, "metavar": "NAME=VALUE"} | {
    "help": "any setting or keyword of the method; wins over a recipe"
}
_DEVICE = _NAME | {"help": "auto (default), cpu, cuda, cuda:1"}


def build_parser() -> argparse.ArgumentParser:
    """The parser of `metawrap`.

    >>> build_parser().parse_args(["train", "--ways", "20"]).ways
    20
    """
    parser = _Parser(prog="metawrap", description="Meta-learning for any PyTorch network.", formatter_class=_Formatter)
    parser.add_argument("--version", action="version", version=f"metawrap {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    adders = _add_train, _add_compare, _add_evaluate, _add_adapt, _add_predict, _add_inspect, _add_report
    for add in (*adders, _add_data_check, _add_recipes):
        add(commands)
    parser.commands = commands.choices
    return parser


class _Formatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32, width=100)


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
            close = get_close_matches(given[2], re.findall(r"[\w+-]+", given[3]), 1)
            if close:
                self.exit(2, f"Error: {given[1]}: invalid choice '{given[2]}'. Did you mean {close[0]}?\n")
        self.exit(2, f"Error: {message.rstrip('.')}. See {self.prog} --help.\n")


def _command(commands: Any, name: str, about: str, usage: str, epilog: str | None = None) -> Any:
    return commands.add_parser(
        name,
        help=about,
        usage=f"metawrap {usage}",
        epilog=epilog,
        formatter_class=_Formatter,
        argument_default=argparse.SUPPRESS,
        add_help=False,
    )


def _add(group: Any, flags: Mapping[str, dict[str, Any]]) -> None:
    for name, options in flags.items():
        group.add_argument(name, **options)


def _add_terminal(parser: Any) -> None:
    group = parser.add_argument_group("terminal (NO_COLOR=1 turns colours off)")
    group.add_argument("-q", "--quiet", **_SWITCH, help="print errors and the result alone")
    group.add_argument("-v", "--verbose", **_SWITCH, help="show the traceback of an error")
    group.add_argument("-h", "--help", action="help", help="show this text")


def _add_train(commands: Any) -> None:
    parser = _command(
        commands,
        "train",
        "meta-train, validate and test a network",
        "train [options]",
        "Rarer: --split NAME, --train-ways N, --validation-alone N, --keep N, --test-norms all|own,\n"
        "--resize crop, --normalise imagenet|none, --stream, --no-stream, --loader-workers N (docs/data.md).\n"
        "In N processes: torchrun --nproc-per-node=N -m metawrap train [options]",
    )
    group = parser.add_argument_group("recipe")
    group.add_argument("--recipe", **_NAME, help="a published experiment (metawrap recipes), or a file.yaml")
    group.add_argument("--set", **_SET)
    _add(parser.add_argument_group("data"), _DATA)
    _add(parser.add_argument_group("method"), _LEARNER | _NETWORK)
    group = parser.add_argument_group("run")
    group.add_argument("--epochs", **_N, help="epochs (10), each with validation and a checkpoint")
    group.add_argument("--iterations", dest="iterations_per_epoch", **_N, help="meta-steps per epoch (50)")
    _add(group, _TASKS)
    seeds = group.add_mutually_exclusive_group()
    seeds.add_argument("--seed", **_SEED)
    seeds.add_argument("--seeds", type=_seeds, default=None, metavar="N,N", help="a run each, with mean and deviation")
    group.add_argument("--device", **_DEVICE)
    group.add_argument("--out", **_PATH, help="the run's folder (runs/...)")
    group.add_argument("--resume", **_SWITCH, help="continue the run in --out; flags may be left out")
    group.add_argument("--keep", **_N, **_RARE)
    group.add_argument("--ensemble", **_N, help="also test the N best averaged (the authors' code: 5)")
    group.add_argument("--test-norms", choices=("all", "own"), **_NAME, **_RARE)
    group.add_argument("--tensorboard", **_SWITCH, help="also log to PATH/tensorboard; kept up by --resume")
    _add_terminal(parser)


def _add_compare(commands: Any) -> None:
    parser = _command(
        commands,
        "compare",
        "train and test several methods on the same tasks",
        "compare --methods NAME,NAME --budget N [options]",
        "Rarer: --split NAME, --train-ways N; see docs/recipes.md.\n"
        "Writes comparison.md, .json and .png; the same command continues one that was stopped.",
    )
    group = parser.add_argument_group("methods")
    group.add_argument("--methods", type=_names, required=True, metavar="NAME,NAME", help=", ".join(METHODS))
    group.add_argument("--budget", required=True, **_N, help="meta-steps of each method")
    own = {"dest": "overrides", "type": _override, "metavar": "METHOD.NAME=VALUE"}
    group.add_argument("--set", **_SET | own | {"help": "of one method: its budget, a setting or a keyword"})
    group.add_argument("--norm", **_NORM, help="one batch-norm policy for all (each method's own)")
    _add(parser.add_argument_group("data"), _DATA)
    _add(parser.add_argument_group("network"), _NETWORK)
    group = parser.add_argument_group("run")
    group.add_argument("--epochs", **_N, help="validations, in equal parts of the budget (10)")
    _add(group, _TASKS | {"--seed": _SEED, "--device": _DEVICE})
    group.add_argument("--jobs", **_N, default=1, help="runs at a time, which share the cores (1)")
    group.add_argument(
        "--out", type=_path, metavar="PATH", default="runs/compare", help="a folder per method (runs/compare)"
    )
    _add_terminal(parser)


def _add_evaluate(commands: Any) -> None:
    parser = _command(commands, "evaluate", "test the best checkpoint of a run", "evaluate RUN [options]")
    parser.add_argument("run", type=_path, metavar="RUN", help="a run's folder, finished or not")
    parser.add_argument("--tasks", dest="test_tasks", **_N, help="tasks of unseen classes (the run's)")
    parser.add_argument(
        "--norm", dest="norms", nargs="+", default=None, **_NORM, help="batch-norm policies (all that apply)"
    )
    parser.add_argument("--ensemble", **_N, help="also average the logits of the N best checkpoints")
    parser.add_argument("--data", **_NAME, help="test on another data set, with images of the same size")
    parser.add_argument("--data-root", type=_path, metavar="PATH", help="its folder or archive")
    for name in ("--ways", "--shots", "--targets"):
        parser.add_argument(
            name, **_DATA[name] | {"help": str(_DATA[name]["help"]).partition(" (")[0] + " (the run's)"}
        )
    about = "classes to test on: test (default), train, validation; all: no split, each must be new"
    parser.add_argument("--part", choices=("all", *PARTS), default="test", metavar="PART", help=about)
    about = "test on all classes that were in neither training nor validation, also later ones"
    parser.add_argument("--new-classes", **_SWITCH, help=about)
    parser.add_argument("--model", **_MODEL | {"help": "the run's own network, which no file is trusted to name"})
    parser.add_argument("--device", **_NAME, help="auto, cpu, cuda, cuda:1 (the run's)")
    parser.add_argument("--out", **_FILE, help="also write the result as JSON")
    _add_terminal(parser)


def _add_adapt(commands: Any) -> None:
    parser = _command(
        commands,
        "adapt",
        "make a classifier from a few photos or texts of each class",
        "adapt RUN|NETWORK --support FOLDER|CSV [options]",
        "Writes classifier.json, network.pt2, weights.safetensors, and predict.py, which needs torch alone; for texts "
        "tokenizer.json, too.",
    )
    about = "a run's folder; or torchvision.models:resnet18, timm:NAME, hf:NAME, MODULE:NAME"
    parser.add_argument("source", metavar="RUN|NETWORK", help=about)
    about = "a folder of photos per class, zip, tar too; texts: a CSV of text,class, or a folder of CLASS.txt"
    parser.add_argument("--support", metavar="FOLDER|CSV", required=True, help=about)
    parser.add_argument("--out", metavar="FOLDER", default="clf", help="the classifier (clf)")
    parser.add_argument(
        "--format", dest="formats", action="append", default=[], choices=("torch", "onnx"), help="onnx: model.onnx too"
    )
    group = parser.add_argument_group("of a network")
    about = "auto (default): of R2D2, SimpleShot, ... the best on examples left out"
    group.add_argument("--method", **_NAME, choices=("auto", *METHODS), help=about)
    about = "DEFAULT (pretrained), or a file of weights (random; DEFAULT for texts)"
    group.add_argument("--weights", metavar="FILE", help=about)
    group.add_argument("--image-size", **_N, help="side in pixels (the pretrained network's)")
    group.add_argument("--set", **_SET | {"help": "a keyword of the method"})
    group = parser.add_argument_group("of a run")
    group.add_argument("--model", **{**_MODEL, "default": None, "help": "the run's own network, named again"})
    group.add_argument("--checkpoint", default="best", **_NAME, help="best (default), newest, or an epoch")
    parser.add_argument("--device", default="auto", **_DEVICE)
    _add_terminal(parser)


def _add_predict(commands: Any) -> None:
    parser = _command(
        commands, "predict", "name what photos show, or what texts are",
        "predict CLASSIFIER PHOTO|TEXT [PHOTO|TEXT ...] [options]",
        "Exit code 2 if a photo or text could not be read; the others are named.",
    )  # fmt: skip
    parser.add_argument("classifier", metavar="CLASSIFIER", help="a folder that metawrap adapt wrote")
    about = "files and folders of photos, or texts; - reads them from standard input"
    parser.add_argument("examples", nargs="*", metavar="PHOTO|TEXT", help=about)
    about = "a file with a photo's name or a text a line; - is standard input"
    parser.add_argument("--lines", metavar="FILE", default=None, help=about)
    parser.add_argument("--top", **_N, default=3, help="classes to name for each (3)")
    parser.add_argument("--json", **_SWITCH, help="one JSON object per line")
    parser.add_argument("--csv", **_SWITCH, help="rows with commas")
    parser.add_argument(
        "--runtime", choices=("torch", "onnx"), default="torch", help="onnx: model.onnx, by onnxruntime"
    )
    _add_terminal(parser)


def _add_inspect(commands: Any) -> None:
    parser = _command(
        commands, "inspect", "show what wrapping a network finds and does", "inspect --model MODULE:NAME [options]"
    )
    parser.add_argument("--model", required=True, **_MODEL)
    parser.add_argument("--weights", **_WEIGHTS)
    _add(parser, _LEARNER | {"--set": _SET})
    parser.add_argument("--ways", **_N, help="classes of the network and of the task (5)")
    about = "of one example: a random task then shows head and engine"
    parser.add_argument("--input-shape", type=_shape, default=None, metavar="C,H,W", help=about)
    parser.add_argument("--json", **_SWITCH, help="print JSON in place of a table")
    parser.add_argument("--html", **_FILE, help="also write the table as an HTML page")
    _add_terminal(parser)


def _add_report(commands: Any) -> None:
    parser = _command(
        commands,
        "report",
        "show what runs have learned, in one HTML file",
        "report RUN [RUN ...] [options]",
        "Runs that differ in their seed alone are drawn as one; a run that still trains, as far as it is.",
    )
    about = "a run's folder, or a folder of such (seeds, a comparison)"
    parser.add_argument("runs", nargs="+", type=_path, metavar="RUN", help=about)
    parser.add_argument("--out", **_FILE, help="the page (report.html in the first run's folder)")
    parser.add_argument(
        "--png", type=_path, metavar="DIR", default=None, help="also draw the main figures, as report-*.png there"
    )
    _add_terminal(parser)


def _add_data_check(commands: Any) -> None:
    data = commands.add_parser("data", help="look at a data set", usage="metawrap data check PATH [options]")
    parser = _command(
        data.add_subparsers(dest="data_command", required=True, metavar="check"),
        "check",
        "what is there, what is broken, and one episode as a picture",
        "data check PATH [options]",
        "Reads every image once. Exit code 2 if training would refuse something.",
    )
    parser.add_argument("path", type=_path, metavar="PATH", help=f"a folder, a file, or a name: {', '.join(DATASETS)}")
    parser.add_argument("--data-root", **_PATH, help="where the files of a named data set lie")
    parser.add_argument("--split", **_NAME, help="as for train")
    parser.add_argument("--image-size", **_N, help="side in pixels (the data set's own)")
    parser.add_argument("--ways", **_N, default=5, help="classes of the episode (5)")
    parser.add_argument("--shots", **_N, default=1, help="support images per class (1)")
    parser.add_argument("--targets", **_N, default=3, help="target images per class (3)")
    parser.add_argument("--seed", **_N, default=0, help="which episode (0)")
    parser.add_argument(
        "--out", type=_path, metavar="FILE", default="contact-sheet.png", help="the picture (contact-sheet.png)"
    )
    parser.add_argument("--json", **_SWITCH, help="print JSON in place of a table")
    _add_terminal(parser)


def _add_recipes(commands: Any) -> None:
    parser = _command(
        commands,
        "recipes",
        "list the published experiments, or show one of them",
        "recipes [NAME]",
        "To run one: metawrap train --recipe NAME [--set NAME=VALUE]",
    )
    parser.add_argument("name", nargs="?", default=None, **_NAME, help="a recipe, or the path of a file.yaml")
    _add_terminal(parser)
