"""`--write-table PATH`: what the zoo found, as a page of the documentation; failures and skips are on it, too."""

from __future__ import annotations

import gc
import os
import platform
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from torchvision_nets import LARGE, LIMIT, builders_below_limit

ENGINES, DIFFERENCES, EVALUATION = ("functional", "higher"), "differences", "evaluation"
PACKAGES = ("torch", "torchvision", "higher", "transformers")
COLUMNS = (
    *("network", "parameters", "`functional`", "`higher`", "evaluation"),
    *("worst error", "finite differences", "seconds", "note"),
)
HEAD = """\
# Supported models

Written by `make zoo` from the run of its tests; do not edit.

For every network below, in float64, metawrap wraps it and takes two second-order inner steps under the multi-step
loss. The meta-loss, the meta-gradient of every parameter and every inner learning rate, and the running statistics
are compared with a plain loop written by hand ([the oracle](../tests/reference/oracle.py), without code of metawrap).

- `equal`: the relative error is at most 1e-9, with the network's own dropout and stochastic depth on, and the module
  that was passed in is unchanged. The worst error stands beside it; 0 is equality to the last bit.
- `refused`: metawrap raised the error that names module, cause and fix, as it must there.
- finite differences: the relative error of the plain loop's meta-gradient along a random direction of all that is
  learned, against central differences of its meta-loss ([how](../tests/support/differences.py)). Of torch's derivatives
  these need only the first, so a wrong second derivative, which both loops would share, shows. At most 1e-6, `in
  float64` where parts that the network computes in float32 ran in float64 for this column; or the reason why the
  gradient of such a network is not the derivative of its output.
- evaluation: `equal` where `learner.evaluate` and the modules of `learner.adapt` were compared as well.

Inputs are small and weights random: this is about gradients, not about accuracy. Two things are changed in the
torchvision and transformers networks ([steady](../tests/support/steady.py)): parameters that start at zero get
random values, lest they hide the other gradients, and batch norms get an eps of 0.1, or 0.5 in MNASNet, RegNet, ResNet,
ResNeXt, Inception and the ResNet-50 segmenters. With less, rounding exceeds 1e-9: at 0.1, resnet50 and regnet_x_3_2gf
missed it by a factor of 5, and the plain loop differed from itself by 2e-9 to 3e-9 when its inputs changed by one
rounding error.
SqueezeNet's last bias is 1: its final ReLU was shut for every image.
"""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-table", type=Path, metavar="PATH", help="write the zoo's results to this Markdown file")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("write_table", default=None)
    if path is not None:
        config.pluginmanager.register(_Table(path), "zoo-table")


@pytest.fixture(autouse=True)
def _memory_suffices(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    if not request.node.get_closest_marker("zoo"):
        yield
        return
    # Two large networks in two processes would need more than the machine has.
    large = any(f"[{name}-" in request.node.name for name in LARGE)
    with FileLock(tmp_path_factory.getbasetemp().parent / "large.lock") if large else nullcontext():
        yield
        gc.collect()  # Graphs are in circles of references, and would add up.


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for place, item in enumerate(items):
        values = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
        if "entry" in values:
            entry, column = values["entry"], values.get("engine", EVALUATION)
            row = {"family": entry.family, "name": entry.name, "note": entry.note, "column": column, "place": place}
            item.user_properties.append(("row", row))  # Here, because a skipped test never runs.


@dataclass
class _Row:
    family: str
    name: str
    note: str
    place: int  # Of its first test among all.
    results: dict[str, str] = field(default_factory=dict)  # By engine, and evaluation: see HEAD, "FAILED", "skipped".
    parameters: int | None = None
    errors: list[float] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        found = {column: result for column, result in self.results.items() if column != DIFFERENCES}
        compared = self.results.get(DIFFERENCES) not in ("FAILED", "skipped", None)
        return set(found) >= set(ENGINES) and set(found.values()) <= {"equal", "refused"} and compared

    def line(self) -> str:
        cells = [
            self.name,
            _short(self.parameters),
            *(self.results.get(engine, "not run") for engine in ENGINES),
            self.results.get(EVALUATION, ""),
            f"{max(self.errors):.0e}" if any(self.errors) else "0" if self.errors else "",
            self.results.get(DIFFERENCES, "not run"),
            f"{self.seconds:.1f}",
            self.note,
        ]
        return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


class _Table:
    """Collects the reports, also those of pytest-xdist's workers, and writes the page at the end."""

    def __init__(self, path: Path) -> None:
        self.path, self.rows = path, {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        found: dict[str, Any] = dict(report.user_properties)  # type: ignore[arg-type]
        if "row" not in found or (report.when != "call" and report.passed):
            return
        about, outcome = dict(found["row"]), found.get("outcome", {"result": "equal"})
        column = about.pop("column")
        row = self.rows.setdefault(about["name"], _Row(**about))
        row.results[column] = "FAILED" if report.failed else "skipped" if report.skipped else outcome["result"]
        row.place = min(row.place, about["place"])
        row.seconds += report.duration
        if report.passed and column in ENGINES:
            row.parameters = outcome["parameters"]
            row.errors += [] if outcome["error"] is None else [outcome["error"]]

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text("\n".join(self._page()) + "\n")
        terminalreporter.write_line(f"zoo: {self._count(list(self.rows.values()))}, written to {self.path}")

    def _page(self) -> Iterator[str]:
        rows = sorted(self.rows.values(), key=lambda row: row.place)  # Processes end in any order.
        yield HEAD
        yield f"{self._count(rows)}, in {sum(row.seconds for row in rows) / 60:.0f} minutes."
        builders = builders_below_limit()
        passed = sum(row.passed and row.name in builders for row in rows)
        yield (
            f"Of torchvision's {len(builders)} classification builders with fewer than {LIMIT // 1_000_000} million "
            f"parameters, {passed} pass."
        )
        yield f"\nRun with {', '.join(map(_version, PACKAGES))}, Python {platform.python_version()},"
        yield f"on a {platform.machine()} CPU with {os.cpu_count()} cores, one thread."
        for family in dict.fromkeys(row.family for row in rows):
            members = [row for row in rows if row.family == family]
            yield f"\n## {family[:1].upper()}{family[1:]}\n\n{self._count(members)}.\n"
            yield f"| {' | '.join(COLUMNS)} |"
            yield "| --- | --: | --- | --- | --- | --: | --- | --: | --- |"
            yield from (row.line() for row in members)

    @staticmethod
    def _count(rows: list[_Row]) -> str:
        failed = sum("FAILED" in row.results.values() for row in rows)
        skipped = sum("skipped" in row.results.values() for row in rows)
        passed = [row for row in rows if row.passed]
        refused = sum(row.results["functional"] == "refused" for row in passed)
        return (
            f"Of {len(rows)} networks {len(passed) - refused} equal the loop, {refused} are refused as they must be, "
            f"{failed} failed, {skipped} skipped"
        )


def _short(count: int | None) -> str:
    if count is None:
        return ""
    scale, unit = (1e6, " M") if count >= 1e6 else (1e3, " k") if count >= 1e3 else (1, "")
    return f"{count / scale:.3g}{unit}"


def _version(package: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return f"no {package}"
