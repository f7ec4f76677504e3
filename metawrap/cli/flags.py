"""Types and flags that several commands share. A setting that is not given is absent from the namespace."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from typing import Any

from metawrap.engines import ENGINES
from metawrap.training.run_settings import BACKBONES, METHODS, NORMS


def names(text: str) -> list[str]:
    """Names between commas."""
    return [name for name in text.split(",") if name]


def seeds(text: str) -> list[int]:
    """Different whole numbers of at least 0, between commas."""
    numbers = _whole_numbers(text, 0, "whole numbers such as 0,1,2")
    if len(set(numbers)) != len(numbers):
        raise argparse.ArgumentTypeError(f"expected different numbers, but got '{text}'")
    return numbers


def shape(text: str) -> tuple[int, ...]:
    """Positive whole numbers between commas."""
    return tuple(_whole_numbers(text, 1, "positive whole numbers such as 3,84,84"))


def _whole_numbers(text: str, least: int, expected: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < least:
        raise argparse.ArgumentTypeError(f"expected {expected}, but got '{text}'")
    return numbers


def override(text: str) -> tuple[str, str, Any]:
    """METHOD.NAME=VALUE as method, name, value."""
    name, value = option(text)
    method, separator, key = name.partition(".")
    if not separator:
        raise argparse.ArgumentTypeError(
            f"expected METHOD.NAME=VALUE, such as protonet.meta_lr=0.003, but got '{text}'"
        )
    return method, key, value


def option(text: str) -> tuple[str, Any]:
    """NAME=VALUE as name and value: JSON where it is that, else the text."""
    name, separator, value = text.partition("=")
    if not separator:
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, such as msl_epochs=15, but got '{text}'")
    try:
        return name, json.loads(value)
    except RecursionError:
        raise argparse.ArgumentTypeError(f"expected a plain value, but that of {name} is nested too deeply") from None
    except ValueError:
        return name, value


def path(text: str) -> str:
    """A path that is not empty."""
    if not text:
        raise argparse.ArgumentTypeError("expected a path, but got ''")
    return text


def checkpoint(text: str) -> str | int:
    """The number of an epoch, or a word."""
    return int(text) if text.isdecimal() else text


N: dict[str, Any] = {"type": int, "metavar": "N"}
X: dict[str, Any] = {"type": float, "metavar": "X"}
NAME: dict[str, Any] = {"metavar": "NAME"}
PATH: dict[str, Any] = {"type": path, "metavar": "PATH", "default": None}
FILE: dict[str, Any] = {"type": path, "metavar": "FILE", "default": None}
SWITCH: dict[str, Any] = {"action": "store_true", "default": False}
ON_OFF: dict[str, Any] = {"action": argparse.BooleanOptionalAction}
# Help fits on a screen, so its epilog alone names these flags.
RARE = {"help": argparse.SUPPRESS}

NETWORKS = "torchvision.models:resnet18, timm:NAME, hf:NAME, MODULE:NAME"

# Flags that several commands share.
DATA: dict[str, dict[str, Any]] = {
    "--data": NAME | {"help": "glyphs (default), omniglot, ..., or a folder of class folders"},
    "--data-root": {
        "type": path,
        "metavar": "PATH",
        "help": "its folder or archive; omniglot and CIFAR are downloaded if missing",
    },
    "--split": NAME | RARE,
    "--image-size": N | {"help": "side in pixels (the data set's: 28, 32 or 84)"},
    "--resize": RARE | {"choices": ("squeeze", "crop")},
    "--rotations": ON_OFF | {"help": "turned images as new classes (default: on for omniglot)"},
    "--normalise": NAME | RARE,
    "--stream": ON_OFF | RARE,
    "--loader-workers": N | RARE,
    "--ways": N | {"help": "classes per task (5)"},
    "--train-ways": N | RARE,
    "--shots": N | {"help": "support images per class (1)"},
    "--targets": N | {"help": "target images per class (1)"},
}
NORM = {"choices": NORMS} | NAME
LEARNER: dict[str, dict[str, Any]] = {
    "--method": NAME
    | {"type": str.lower, "choices": tuple(METHODS), "help": "maml++ (default); metawrap compare --help lists all"},
    "--preset": NAME | {"help": "inductive (default), authors_code or paper, for maml++"},
    "--norm": NORM | {"help": "batch norm: batch, running, support, task, task_layer (the method's)"},
    "--engine": NAME | {"help": f"auto (default: chooses one), {', '.join(ENGINES)}"},
    "--inner-steps": N | {"help": "inner updates per task (the method's: 5)"},
    "--inner-lr": X | {"help": "first inner learning rate (0.1)"},
    "--meta-lr": X | {"help": "outer learning rate (the method's: 0.001)"},
}
MODEL = {"metavar": "MODULE:NAME", "help": "your network: NAME() or NAME(ways=...); or timm:NAME, hf:FOLDER"}
WEIGHTS = {"metavar": "FILE", "help": "its weights: a file, or DEFAULT for the published ones (random)"}
NETWORK: dict[str, dict[str, Any]] = {
    "--backbone": NAME | {"choices": BACKBONES, "help": f"conv4 (default), {', '.join(BACKBONES[1:])}"},
    "--filters": N | {"help": "channels of its first block (64)"},
    "--model": MODEL,
    "--weights": WEIGHTS,
}
TASKS: dict[str, dict[str, Any]] = {
    "--batch": N | {"dest": "tasks_per_batch", "help": "tasks per meta-step (8)"},
    "--validation-tasks": N | {"help": "fixed tasks to validate on (200)"},
    "--validation-alone": N | RARE,
    "--test-tasks": N | {"help": "fixed tasks of unseen classes to test on (600)"},
}
SEED = N | {"help": "of the initial weights and the order of tasks (0)"}
SEEDS: dict[str, Any] = {
    "type": seeds,
    "default": None,
    "metavar": "N,N",
    "help": "a run each, with mean and deviation",
}
SET = {"action": "append", "dest": "options", "type": option, "metavar": "NAME=VALUE"} | {
    "help": "any setting or keyword of the method; wins over a recipe"
}
DEVICE = NAME | {"help": "auto (default), cpu, cuda, cuda:1"}


class Formatter(argparse.RawDescriptionHelpFormatter):
    """Wide enough for the names of flags."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32, width=100)


def new_command(commands: Any, name: str, about: str, usage: str, epilog: str | None = None) -> Any:
    """Adds the parser of a command."""
    return commands.add_parser(
        name,
        help=about,
        usage=f"metawrap {usage}",
        epilog=epilog,
        formatter_class=Formatter,
        argument_default=argparse.SUPPRESS,
        add_help=False,
    )


def add_flags(group: Any, flags: Mapping[str, dict[str, Any]]) -> None:
    """Adds flags by name."""
    for name, options in flags.items():
        group.add_argument(name, **options)


def add_terminal(parser: Any) -> None:
    """Adds the flags of every command: --quiet, --verbose, --help."""
    group = parser.add_argument_group("terminal (NO_COLOR=1 turns colours off)")
    group.add_argument("-q", "--quiet", **SWITCH, help="print errors and the result alone")
    group.add_argument("-v", "--verbose", **SWITCH, help="show the traceback of an error")
    group.add_argument("-h", "--help", action="help", help="show this text")
