"""Compares metawrap with a plain loop and with other libraries, in one run: gradients first, then time and memory.

    python benchmarks/compare.py --cases A A15 B C --repeats 9 --out runs/compare
    python benchmarks/compare.py --grow tasks steps width --out runs/growth

For each case: every setting's float64 meta-gradient is held against the plain loop's (what disagrees is reported, and
not timed), then one meta-step of each is timed in turn, `--repeats` times, and each one's peak memory is taken in a
process of its own. Same initial weights, tasks, threads and allocator for all; JAX is timed in its turn too, but in its
own process, as its threads slow torch's. Cases as in cases.py, settings as in
competitors.py; one that cannot run here is named, with the reason.

Writes compare.jsonl (a record for each measurement), compare.png, growth.png; `benchmarks/charts.py DIR` draws again.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cases import CASES, Case, small
from charts import draw
from competitors import GROWING, REFERENCE, SETTINGS
from machine import environment, has_glibc, use_threads
from measure import Record, in_child
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

GROWTH = {"tasks": (1, 2, 4, 8, 16, 64), "steps": (1, 2, 5, 10), "width": (16, 32, 64, 128)}
FIELDS = {"tasks": "tasks", "steps": "steps", "width": "filters"}


def compare(case: Case, names: Sequence[str], repeats: int, shared: Record) -> Iterator[Record]:
    """All records of one case: agreement, times of those that agree, memory of those that were timed."""
    right = []
    for record in in_child("agreement", case, shared, names=names):
        yield record
        if record["kind"] == "agreement" and record["agrees"]:
            right.append(record["setting"])
    if REFERENCE not in right:
        return
    for record in in_child("times", case, shared, names=right, repeats=repeats):
        yield record
        if record["kind"] != "time" and record["setting"] in right:
            right.remove(record["setting"])
    for name in right:
        yield from in_child("memory", case, shared, name=name)


def grown(case: Case, kind: str, values: Sequence[int]) -> Iterator[tuple[int, Case]]:
    """The case at each value of what grows."""
    for value in values:
        yield value, replace(case, **{FIELDS[kind]: value})


def table_of(case: Case, records: Sequence[Record]) -> Table:
    """One row for each setting."""
    table = Table(title=str(case), title_justify="left", title_style="bold", box=SIMPLE_HEAD)
    table.add_column("setting", no_wrap=True)
    for column in ("error", "seconds", "quartiles", "ratio", "MB"):
        table.add_column(column, justify="right", no_wrap=True)
    by_setting: dict[Any, dict[str, Record]] = {}
    for record in records:
        by_setting.setdefault(record["setting"], {})[record["kind"]] = record
    left_out = []
    for name, found in by_setting.items():
        for kind in ("skipped", "failed"):
            if kind in found:
                left_out.append(f"{kind}: {name}: {found[kind]['reason']}")
        if "agreement" not in found:
            continue
        checked, timed, held = (found.get(kind) for kind in ("agreement", "time", "memory"))
        if not checked["agrees"]:
            left_out.append(f"wrong, not timed: {name}: its gradient of {checked['worst_tensor']} differs")
        row = [name, f"{checked['relative_error']:.0e}" + ("" if checked["agrees"] else " WRONG")]
        row += [f"{timed['median_s']:.3f}", f"{timed['q1_s']:.3f}-{timed['q3_s']:.3f}"] if timed else ["", ""]
        row += [f"{timed['ratio_to_plain']:.2f}" if timed else "", f"{held['peak_mb']:.0f}" if held else ""]
        table.add_row(*row, style="bold" if name == REFERENCE else None)
    table.caption = "\n".join(left_out) or None
    table.caption_justify = "left"
    return table


def main() -> None:
    """Measures, prints a table for each case, and writes records and charts."""
    args = _arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    shared = {"device": args.device, "threads": args.threads, "allocator": args.allocator}
    # Here too, so that the processes started from here have no more cores, and that the records say so.
    use_threads(args.threads, args.device)
    everywhere = environment(args.device, args.allocator)
    shrink = small if args.small else lambda case: case
    runs: list[tuple[Record, Case, list[str]]] = [({}, shrink(CASES[name]), args.only) for name in args.cases]
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="*", choices=list(CASES), help="all of them, or none with --grow, if left out")
    parser.add_argument("--repeats", type=int, default=9)
    usual = [name for name, setting in SETTINGS.items() if not setting.by_name]
    parser.add_argument("--only", nargs="+", default=usual, choices=list(SETTINGS), help="settings to compare")
    parser.add_argument("--grow", nargs="+", default=[], choices=list(GROWTH), help="curves over these")
    parser.add_argument("--grow-case", default="A", choices=list(CASES), help="where the curves start from")
    parser.add_argument("--grow-values", nargs="+", type=int, help="instead of each curve's own")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="inside an operation; on the CPU, cores for everybody")
    parser.add_argument("--allocator", choices=("tuned", "default"), default="tuned" if has_glibc() else "default")
    parser.add_argument("--small", action="store_true", help="tiny shapes, to see that it runs: no figures to quote")
    parser.add_argument("--out", type=Path, required=True, help="folder for records and charts")
    args = parser.parse_args()
    if args.repeats < 1:
        parser.error(f"--repeats: expected at least 1, but got {args.repeats}")
    if args.cases is None:
        args.cases = [] if args.grow else list(CASES)
    args.only = [name for name in SETTINGS if name in {REFERENCE, *args.only}]
    return args


if __name__ == "__main__":
    main()
