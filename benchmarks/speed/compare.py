"""Compares a meta-step with a plain loop, other libraries and other versions of metawrap, in one run.

    python benchmarks compare --cases A A15 B C --repeats 9 --out runs/compare
    python benchmarks compare --grow tasks steps width ranks --out runs/growth
    python benchmarks compare --cases A --only "metawrap default" --also ../before --out runs/versions

For each case, in this order:

- Every setting's float64 meta-gradient is compared with the plain loop's. A setting that disagrees is reported, and not
  timed.
- One meta-step of each is timed in turn, `--repeats` times. Initial weights, tasks, threads and allocator are the same
  for all. JAX is timed in its turn too, but in a process of its own, because its threads slow torch's.
- The peak memory of each is taken in a process of its own.

`--also FOLDER` adds the metawrap of another checkout, in processes of its own, for the settings that every version has:
"metawrap default", and those that name an engine and nothing else. The same settings of this version then run in
processes of their own, too, and the ratio of the two times is printed.

The cases are those of rivals/cases.py, the settings those of rivals/contenders.py. A setting that cannot run here is
named, with the reason. Writes compare.jsonl (a record for each measurement), compare.png and growth.png;
`python benchmarks charts FOLDER` draws again.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rivals.cases import CASES, Case, small
from rivals.contenders import GROWING, REFERENCE, SETTINGS, setting_of
from speed.arguments import parsed, parser_of
from speed.charts import draw
from speed.machine import commit_of, environment, has_glibc, use_threads
from speed.processes import Record, in_child

GROWTH = {"tasks": (1, 4, 16, 64, 256), "steps": (1, 2, 5, 10, 50), "width": (16, 32, 64, 128), "ranks": (1, 2, 4)}
FIELDS = {"tasks": "tasks", "steps": "steps", "width": "filters", "ranks": "ranks"}


def compare(case: Case, names: Sequence[str], repeats: int, shared: Record) -> Iterator[Record]:
    """All records of one case: agreement, times of the settings that agree, memory of those that were timed."""
    checkouts = dict.fromkeys(setting_of(name).checkout for name in names)
    right = []
    for checkout in checkouts:
        own = [name for name in names if setting_of(name).checkout == checkout]
        ranks = max(setting_of(name).ranks(case) for name in own)
        for record in in_child("agreement", case, shared | {"checkout": checkout}, ranks, names=own):
            yield record
            if record["kind"] == "agreement" and record["agrees"]:
                right.append(record["setting"])
    if REFERENCE not in right:
        return
    apart = [name for name in right if setting_of(name).in_every_version] if len(checkouts) > 1 else []
    for record in in_child("times", case, shared, names=right, repeats=repeats, apart=apart):
        yield record
        if record["kind"] in ("skipped", "failed") and record["setting"] in right:
            right.remove(record["setting"])
    for name in right:
        setting = setting_of(name)
        yield from in_child("memory", case, shared | {"checkout": setting.checkout}, setting.ranks(case), name=name)


def grown(case: Case, kind: str, values: Sequence[int]) -> Iterator[tuple[int, Case]]:
    """The case at each value of the field that grows."""
    for value in values:
        yield value, replace(case, **{FIELDS[kind]: value})


def table_of(case: Case, records: Sequence[Record]) -> Table:
    """One row for each setting that was checked; the reasons of the others, and the ratios of versions, below."""
    table = Table(title=str(case), title_justify="left", title_style="bold", box=SIMPLE_HEAD, caption_justify="left")
    table.add_column("setting", no_wrap=True)
    for column in ("error", "seconds", "quartiles", "ratio", "MB"):
        table.add_column(column, justify="right", no_wrap=True)
    by_setting: dict[Any, dict[str, Record]] = {}
    for record in records:
        by_setting.setdefault(record["setting"], {})[record["kind"]] = record
    below = []
    for name, found in by_setting.items():
        below += [f"{kind}: {name}: {found[kind]['reason']}" for kind in ("skipped", "failed") if kind in found]
        if "versions" in found:
            here, _, folder = name.partition(" at ")
            below.append(f"{here}: {found['versions']['here_over_there']:.3f} of its time at {folder}")
        if "agreement" not in found:
            continue
        checked, timed, held = (found.get(kind) for kind in ("agreement", "time", "memory"))
        if not checked["agrees"]:
            below.append(f"wrong, not timed: {name}: its gradient of {checked['worst_tensor']} differs")
        row = [name, f"{checked['relative_error']:.0e}" + ("" if checked["agrees"] else " WRONG")]
        row += [f"{timed['median_s']:.3f}", f"{timed['q1_s']:.3f}-{timed['q3_s']:.3f}"] if timed else ["", ""]
        row += [f"{timed['ratio_to_plain']:.2f}" if timed else "", f"{held['peak_mb']:.0f}" if held else ""]
        table.add_row(*row, style="bold" if name == REFERENCE else None)
    table.caption = escape("\n".join(below)) or None
    return table


def main() -> None:
    """Measures, prints a table for each case, and writes records and charts."""
    args = _arguments()
    shared = {"device": args.device, "threads": args.threads, "allocator": args.allocator}
    # In this process too: the processes that it starts inherit its cores, and its records show its threads.
    use_threads(args.threads, args.device)
    everywhere = environment(args.device, args.allocator) | {"also": {path: commit_of(path) for path in args.also}}
    shrink = small if args.small else lambda case: case
    runs: list[tuple[Record, Case, list[str]]] = [({}, shrink(CASES[name]), args.names) for name in args.cases]
    for kind in args.grow:
        names = [name for name in GROWING if name in args.only]
        for value, case in grown(shrink(CASES[args.grow_case]), kind, args.grow_values or GROWTH[kind]):
            runs.append(({"grow": kind, "value": value}, case, names))
    console, records = Console(width=None if sys.stdout.isatty() else 120), []
    with (args.out / "compare.jsonl").open("w", encoding="utf-8") as file:
        for marks, case, names in runs:
            found = []
            with console.status(f"case {case.name} {marks or ''}") as status:
                for record in compare(case, names, args.repeats, shared):
                    found.append(everywhere | marks | record)
                    status.update(f"case {case.name} {marks or ''}: {record['kind']} of {record['setting']}")
                    file.write(json.dumps(found[-1]) + "\n")
                    file.flush()
            console.print(table_of(case, found))
            records += found
    console.print("error: of the gradient, to the plain loop's. seconds: median. ratio: to the plain loop's median.")
    console.print("MB: peak above the imports, inputs included.")
    for path in draw(records, args.out):
        console.print(f"wrote {path}")
    if not any(record["kind"] == "time" for record in records):
        raise SystemExit("Nothing was timed: see the reasons above.")


def _arguments() -> argparse.Namespace:
    parser = parser_of(__doc__, [name for name, setting in SETTINGS.items() if not setting.by_name])
    parser.add_argument(
        "--also", nargs="+", default=[], metavar="FOLDER", help="checkouts of other versions of metawrap"
    )
    parser.add_argument("--grow", nargs="+", default=[], choices=list(GROWTH), help="curves over these")
    parser.add_argument("--grow-case", default="A", choices=list(CASES), help="the case that the curves start from")
    parser.add_argument("--grow-values", nargs="+", type=int, help="instead of each curve's own")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--threads", type=int, default=2, help="inside an operation; on the CPU, cores of each contender"
    )
    parser.add_argument("--allocator", choices=("tuned", "default"), default="tuned" if has_glibc() else "default")
    args = parsed(parser)
    if args.cases is None:
        args.cases = [] if args.grow else list(CASES)
    args.also = [str(Path(folder).resolve()) for folder in args.also]
    for folder in args.also:
        if not Path(folder, "metawrap", "__init__.py").exists():
            parser.error(f"--also: expected the folder of a checkout, with metawrap/ in it, but got {folder}")
    shared = [name for name in args.only if SETTINGS[name].in_every_version]
    if args.also and not shared:
        parser.error('--also: no setting that every version has is among --only. Add "metawrap default" to it.')
    args.names = args.only + [f"{name} at {folder}" for folder in args.also for name in shared]
    return args
