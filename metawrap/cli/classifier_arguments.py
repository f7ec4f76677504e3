"""The flags of `metawrap adapt`, `serve` and `predict`."""

from __future__ import annotations

from typing import Any

from metawrap.cli.flags import DEVICE, MODEL, NAME, NETWORKS, SET, SWITCH, N, add_terminal, checkpoint, new_command
from metawrap.training.run_settings import METHODS


def add_adapt(commands: Any) -> None:
    """Adds the parser of `metawrap adapt`."""
    parser = new_command(
        commands,
        "adapt",
        "make a classifier from a few photos or texts of each class",
        "adapt RUN|NETWORK --support FOLDER|CSV [options]",
        "Writes a folder: the program, its weights, and predict.py, which needs no metawrap.",
    )
    parser.add_argument("source", metavar="RUN|NETWORK", help=f"a run's folder; or {NETWORKS}")
    about = "a folder of photos per class, zip, tar too; texts: a CSV of text,class, or a folder of CLASS.txt"
    parser.add_argument("--support", metavar="FOLDER|CSV", required=True, help=about)
    parser.add_argument("--out", metavar="FOLDER", default="clf", help="the classifier (clf)")
    parser.add_argument(
        "--format", dest="formats", action="append", default=[], choices=("torch", "onnx"), help="onnx: model.onnx too"
    )
    _add_source(parser)
    add_terminal(parser)


def _add_source(parser: Any) -> None:
    group = parser.add_argument_group("of a network")
    about = "auto (default): of R2D2, SimpleShot, ... the best on examples left out"
    group.add_argument("--method", **NAME, type=str.lower, choices=("auto", *METHODS), help=about)
    about = "DEFAULT (pretrained), or a file of weights (random; DEFAULT for texts)"
    group.add_argument("--weights", metavar="FILE", help=about)
    group.add_argument("--image-size", **N, help="side in pixels (the pretrained network's)")
    group.add_argument("--set", **SET | {"help": "a keyword of the method"})
    group = parser.add_argument_group("of a run")
    group.add_argument("--model", **{**MODEL, "default": None, "help": "the run's own network, named again"})
    group.add_argument("--checkpoint", type=checkpoint, **NAME, help="best (default), newest, or an epoch")
    parser.add_argument("--device", default="auto", **DEVICE)


def add_serve(commands: Any) -> None:
    """Adds the parser of `metawrap serve`."""
    parser = new_command(
        commands, "serve", "a web page that names what photos show, and learns classes", "serve SOURCE [options]",
        "A classifier predicts alone. On a run or a network, the page learns classes from photos.",
    )  # fmt: skip
    about = f"a folder that metawrap adapt wrote; a run's folder; or {NETWORKS}"
    parser.add_argument("source", metavar="SOURCE", help=about)
    parser.add_argument("--host", default="127.0.0.1", **NAME, help="address (127.0.0.1: this machine alone)")
    parser.add_argument("--port", default=8000, **N, help="port (8000); 0: any free one")
    _add_source(parser)
    add_terminal(parser)


def add_predict(commands: Any) -> None:
    """Adds the parser of `metawrap predict`."""
    parser = new_command(
        commands, "predict", "name what photos show, or what texts are",
        "predict CLASSIFIER PHOTO|TEXT [PHOTO|TEXT ...] [options]",
        "Exit code 2 if a photo or text could not be read; the others are named.",
    )  # fmt: skip
    parser.add_argument("classifier", metavar="CLASSIFIER", help="a folder that metawrap adapt wrote")
    about = "files and folders of photos, or texts; - reads them from standard input"
    parser.add_argument("examples", nargs="*", default=[], metavar="PHOTO|TEXT", help=about)
    about = "a file with a photo's name or a text a line; - is standard input"
    parser.add_argument("--lines", metavar="FILE", default=None, help=about)
    parser.add_argument("--top", **N, default=3, help="classes to name for each (3)")
    parser.add_argument("--json", **SWITCH, help="one JSON object per line")
    parser.add_argument("--csv", **SWITCH, help="rows with commas")
    parser.add_argument(
        "--runtime", choices=("torch", "onnx"), default="torch", help="onnx: model.onnx, by onnxruntime"
    )
    add_terminal(parser)
