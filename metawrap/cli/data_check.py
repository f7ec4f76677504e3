"""`metawrap data check`: the content of a data set, its broken images, and a contact sheet of one episode."""

from __future__ import annotations

import json
import shlex
from argparse import Namespace
from pathlib import Path

from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from metawrap.data import DataSplits, EpisodeSampler
from metawrap.data.check_data import FOLDER, DataReport, check_data
from metawrap.data.class_split import PARTS
from metawrap.data.contact_sheet import contact_sheet
from metawrap.data.episode_draws import Demand, check_enough
from metawrap.errors import ArgumentError, DataError, printable, writing
from metawrap.training.machine import program
from metawrap.training.progress import say

_LISTED = 20  # Broken images that are printed one by one.


def run_data_check(arguments: Namespace) -> None:
    """Prints the report and writes the picture. Raises DataError if training would refuse the data."""
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
    drawn = not report.broken and problem is None
    if arguments.json:
        content = {**report.to_dict(), "problem": problem, "contact_sheet": str(out) if drawn else None}
        print(json.dumps(content, indent=2))
    else:
        _show(report)
        if drawn:
            print(printable(f"Contact sheet: {out}\nTrain on it: {_command(report)}"))
    if report.broken:
        raise DataError(f"{len(report.broken)} images are broken. Replace or remove them, then check again.")
    if problem is not None:
        raise DataError(problem)


def _draw(splits: DataSplits, arguments: Namespace, out: Path) -> str | None:
    """Writes the picture; returns the problem if an episode cannot be drawn."""
    ways, shots, targets = arguments.ways, arguments.shots, arguments.targets
    try:  # Training draws tasks from each of the three parts.
        demands = [Demand(images, ways, part=part) for part, images in zip(PARTS, splits, strict=True)]
        check_enough(demands, shots, targets)
        with writing("out", out):
            contact_sheet(EpisodeSampler(splits.train, ways, shots, targets, seed=arguments.seed)).save(out)
    except DataError as error:
        return str(error)
    return None


def _show(report: DataReport) -> None:
    console = Console(highlight=False, markup=False, soft_wrap=True)
    shape = " x ".join(map(str, report.image_shape))
    console.print(printable(f"{report.data}: {report.layout}; images become {shape}"))
    table = Table(box=None, padding=(0, 2), header_style="bold", show_edge=False)
    for name in ("part", "classes", "images", "per class: min", "median", "max", "broken"):
        table.add_column(name, justify="left" if name == "part" else "right")
    for part in report.parts:
        numbers = (part.classes, part.images, part.smallest, f"{part.median:g}", part.largest, len(part.broken))
        table.add_row(part.part, *map(str, numbers), style="red" if part.broken else None)
    console.print(table)
    for note in report.notes:
        console.print(printable(f"Note: {note}"))
    for error in report.broken[:_LISTED]:
        say(f"Broken: {error}")
    if len(report.broken) > _LISTED:
        say(f"... and {len(report.broken) - _LISTED} more; --json lists all.")


def _command(report: DataReport) -> str:
    if report.data == FOLDER:
        where = ["--data", str(report.root)]
    else:
        where = ["--data", report.data] + ([] if report.root is None else ["--data-root", report.root])
    return f"{program()} train {shlex.join(where)}"
