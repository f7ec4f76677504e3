"""`metawrap data check`: what lies at a path, what is broken in it, and a contact sheet of one episode."""

from __future__ import annotations

import json
import shlex
from argparse import SUPPRESS, Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from metawrap.data import DATASETS, DataSplits, EpisodeSampler
from metawrap.data.check_data import FOLDER, DataReport, check_data
from metawrap.data.class_split import PARTS
from metawrap.data.contact_sheet import contact_sheet
from metawrap.errors import ArgumentError, DataError
from metawrap.training.machine import program
from metawrap.training.progress import say

_SHOWN = 20  # broken images that are listed one by one


def add_data_command(commands: Any, formatter: Any, add_terminal_flags: Callable[[Any], None]) -> None:
    """Adds `data check` to the sub-commands."""
    data = commands.add_parser("data", help="look at a data set", usage="metawrap data check PATH [options]")
    check = data.add_subparsers(dest="data_command", required=True, metavar="check").add_parser(
        "check",
        help="what is there, what is broken, and one episode as a picture",
        usage="metawrap data check PATH [options]",
        epilog="Reads every image once. Exit code 2 if training would refuse something.",
        formatter_class=formatter,
        argument_default=SUPPRESS,
        add_help=False,
    )
    check.add_argument("path", metavar="PATH", help=f"a folder, a file, or a name: {', '.join(DATASETS)}")
    check.add_argument("--data-root", default=None, metavar="PATH", help="where the files of a named data set lie")
    check.add_argument("--split", metavar="NAME", help="as for train")
    check.add_argument("--image-size", type=int, metavar="N", help="side in pixels (the data set's own)")
    check.add_argument("--ways", type=int, default=5, metavar="N", help="classes of the episode (5)")
    check.add_argument("--shots", type=int, default=1, metavar="N", help="support images per class (1)")
    check.add_argument("--targets", type=int, default=3, metavar="N", help="target images per class (3)")
    check.add_argument("--seed", type=int, default=0, metavar="N", help="which episode (0)")
    check.add_argument("--out", default="contact-sheet.png", metavar="FILE", help="the picture (contact-sheet.png)")
    check.add_argument("--json", action="store_true", default=False, help="print JSON in place of a table")
    add_terminal_flags(check)


def run_data_check(arguments: Namespace) -> None:
    """Prints the report and writes the picture.

    Raises:
        DataError: something is broken that training would refuse.
    """
    out = Path(arguments.out)
    if out.suffix.lower() != ".png" or not out.parent.is_dir():
        raise ArgumentError(f"out: expected a .png file in an existing folder, but got '{out}'.")
    options = {name: getattr(arguments, name) for name in ("split", "image_size") if hasattr(arguments, name)}
    with tqdm(unit="image", leave=False, disable=None, delay=1) as bar:

        def seen(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        report, splits = check_data(arguments.path, arguments.data_root, seen, **options)
    problem = _draw(splits, arguments, out) if not report.broken else None
    if arguments.json:
        written = None if problem or report.broken else str(out)
        print(json.dumps({**report.to_dict(), "problem": problem, "contact_sheet": written}, indent=2))
    else:
        _show(report)
        if not report.broken and problem is None:
            print(f"Contact sheet: {out}\nTrain on it: {_command(report)}")
    if report.broken:
        raise DataError(f"{len(report.broken)} images are broken. Replace or remove them, then check again.")
    if problem is not None:
        raise DataError(problem)


def _draw(splits: DataSplits, arguments: Namespace, out: Path) -> str | None:
    """Writes the picture; what keeps an episode from being drawn, or None."""
    samplers = []
    try:
        # Validation and test tasks are drawn like this too, so all three parts have to be large enough.
        for part in splits:
            samplers.append(
                EpisodeSampler(part, arguments.ways, arguments.shots, arguments.targets, seed=arguments.seed)
            )
        contact_sheet(samplers[0]).save(out)
    except DataError as error:
        return f"{PARTS[len(samplers) % 3]}: {error}"
    except OSError as error:
        raise ArgumentError(
            f"out: cannot write '{out}' ({error.strerror}). Name a file in a folder of yours."
        ) from error
    return None


def _show(report: DataReport) -> None:
    console = Console()
    shape = " x ".join(map(str, report.image_shape))
    console.print(
        f"{report.data}: {report.layout}; images become {shape}", highlight=False, markup=False, soft_wrap=True
    )
    table = Table(box=None, padding=(0, 2), header_style="bold", show_edge=False)
    for name in ("part", "classes", "images", "per class: min", "median", "max", "broken"):
        table.add_column(name, justify="left" if name == "part" else "right")
    for part in report.parts:
        numbers = (part.classes, part.images, part.smallest, f"{part.median:g}", part.largest, len(part.broken))
        table.add_row(part.part, *(str(number) for number in numbers), style="red" if part.broken else None)
    console.print(table)
    for note in report.notes:
        console.print(f"Note: {note}", highlight=False, markup=False, soft_wrap=True)
    for error in report.broken[:_SHOWN]:
        say(f"Broken: {error}")
    if len(report.broken) > _SHOWN:
        say(f"... and {len(report.broken) - _SHOWN} more; --json lists all.")


def _command(report: DataReport) -> str:
    root = [] if report.root is None else [report.root]
    where = (
        ["--data", *root]
        if report.data == FOLDER
        else ["--data", report.data, *(["--data-root", *root] if root else [])]
    )
    return f"{program()} train {shlex.join(where)}"
