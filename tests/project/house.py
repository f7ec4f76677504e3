"""The numbers of design.md, counted: `python tests/project/house.py` prints them for the metawrap that Python finds.

    PYTHONPATH=/path/to/another/checkout python tests/project/house.py

test_architecture.py holds the numbers to design.md's limits.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import statistics
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, is_dataclass
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any, get_args, get_type_hints

import torch
from torch import nn

import metawrap
from metawrap import MAMLPlusPlus

PACKAGE = Path(metawrap.__file__).parent
TESTS = PACKAGE.parent / "tests"
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(PACKAGE.rglob("*.py"))}


def _network() -> nn.Module:
    """Conv4 as a user writes it: its own frames are no files of the package."""
    layers: list[nn.Module] = []
    for channels in (1, 4, 4, 4):
        layers += [nn.Conv2d(channels, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(4, 5))


def lines_of(path: Path) -> int:
    """Lines of a file, as `wc -l` counts them."""
    return path.read_text(encoding="utf-8").count("\n")


def lines_per_file() -> Counter[str]:
    """Lines of each file of the package, by its path in the package."""
    return Counter({str(path.relative_to(PACKAGE)): lines_of(path) for path in TREES})


def lines_per_room() -> Counter[str]:
    """Lines of each folder of the package; a file beside the folders is a room of its own."""
    rooms: Counter[str] = Counter()
    for path, lines in lines_per_file().items():
        rooms[Path(path).parts[0]] += lines
    return rooms


def lines_of_tests() -> int:
    """Lines of all Python files under tests/."""
    return sum(map(lines_of, TESTS.rglob("*.py")))


def methods_per_class() -> Counter[str]:
    """Distinct names of the functions in each class body; a property and its setter are one."""
    found: Counter[str] = Counter()
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                functions = {part.name for part in node.body if isinstance(part, ast.FunctionDef)}
                found[f"{path.relative_to(PACKAGE)}: {node.name}"] = len(functions)
    return found


def lines_per_function() -> list[int]:
    """Lines of each function and method of the package, decorators left out."""
    functions = (node for tree in TREES.values() for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))
    return sorted((node.end_lineno or node.lineno) - node.lineno + 1 for node in functions)


def classes() -> Iterator[type]:
    """Every class at the top of a module of the package."""
    for path in TREES:
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        if parts[-1] == "__main__":
            continue
        module = importlib.import_module(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
        yield from (c for c in vars(module).values() if isinstance(c, type) and c.__module__ == module.__name__)


def own_bases() -> dict[str, list[str]]:
    """The package's classes that each class inherits from, near ones first.

    Protocols, errors, dataclasses and named tuples do not count: they bring no behaviour that must be read first.
    """
    return {named(kind): [base.__name__ for base in kind.__mro__[1:] if _counts(base)] for kind in classes()}


def _counts(base: type) -> bool:
    form = issubclass(base, BaseException) or is_dataclass(base) or hasattr(base, "_fields")
    return base.__module__.startswith("metawrap.") and not form and not getattr(base, "_is_protocol", False)


def keywords_per_constructor() -> Counter[str]:
    """Parameters after `model` of each `__init__` that is written out; Unpack[a TypedDict] counts its keys.

    `**keywords` without a TypedDict count as those of the next constructor that the class inherits.
    """
    written = [kind for kind in classes() if not is_dataclass(kind) and inspect.isfunction(vars(kind).get("__init__"))]
    return Counter({named(kind): len(_keywords(list(kind.__mro__)) - {"self", "model"}) for kind in written})


def _keywords(order: list[type]) -> set[str]:
    place = next((i for i, kind in enumerate(order) if inspect.isfunction(vars(kind).get("__init__"))), None)
    if place is None or not order[place].__module__.startswith("metawrap."):
        return set()
    constructor = vars(order[place])["__init__"]
    names: set[str] = set()
    for name, parameter in inspect.signature(constructor).parameters.items():
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD:
            names.add(name)
        elif keys := get_args(get_type_hints(constructor).get(name)):
            names |= get_type_hints(keys[0]).keys()
        else:
            names |= _keywords(order[place + 1 :])
    return names


def named(kind: type) -> str:
    """A class by its module and name."""
    return f"{kind.__module__.removeprefix('metawrap.')}.{kind.__name__}"


@dataclass
class Passage:
    """The way of one call through the package.

    files: all files that it enters. deepest: the stack with the most frames of the package, as (file, function).
    changes: the
    most changes from one file to another along a stack.
    """

    files: set[str]
    deepest: list[tuple[str, str]]
    changes: int = 0


def steady_meta_step(**options: Any) -> Passage:
    """The way of the fourth `meta_step` of a small Conv4 under MAML++: all that is done once has been done."""
    torch.manual_seed(0)
    learner = MAMLPlusPlus(_network(), inner_steps=2, **options)
    images, labels = torch.rand(2, 5, 1, 28, 28), torch.arange(5).expand(2, 5)
    batch = images, labels, images.flip(1), labels.flip(1)
    for _ in range(3):
        learner.meta_step(batch)
    passage, stack, root = Passage(set(), []), [], f"{PACKAGE}/"

    def watch(frame: FrameType, event: str, _: Any) -> None:
        name = frame.f_code.co_filename
        if not name.startswith(root):
            return
        if event == "call":
            stack.append((name.removeprefix(root), frame.f_code.co_name))
            passage.files.add(stack[-1][0])
            changes = sum(caller[0] != called[0] for caller, called in pairwise(stack))
            passage.changes = max(passage.changes, changes)
            passage.deepest = max(passage.deepest, list(stack), key=len)
        elif event == "return":
            stack.pop()

    sys.setprofile(watch)
    try:
        learner.meta_step(batch)
    finally:
        sys.setprofile(None)
    return passage


def table() -> Iterator[str]:
    """The lines that this script prints."""
    files, rooms, functions = lines_per_file(), lines_per_room(), lines_per_function()
    total = files.total()
    yield f"package                 {total:6,} lines in {len(files)} files; tests {lines_of_tests():,} lines"
    middle, high = statistics.median(functions), functions[int(0.9 * len(functions))]
    yield f"functions               {middle:6.0f} lines in the median, {high} at the 90th percentile"
    yield "rooms"
    yield from (f"  {room:20}  {lines:6,}  {lines / total:6.1%}" for room, lines in rooms.most_common())
    bases = Counter({name: len(found) for name, found in own_bases().items()})
    for title, found in (
        ("longest files", files),
        ("most methods of a class", methods_per_class()),
        ("most own base classes", bases),
        ("most keywords of a constructor", keywords_per_constructor()),
    ):
        yield title
        yield from (f"  {count:6}  {name}" for name, count in found.most_common(6))
    for engine in ("auto", "functional"):
        passage = steady_meta_step(engine=engine)
        yield f"a steady meta_step of MAMLPlusPlus with engine={engine!r}"
        yield f"  {len(passage.files):6}  files, {len(passage.deepest)} frames, {passage.changes} changes of file deep"
        yield "  files: " + ", ".join(sorted(passage.files))
        yield "  deepest stack: " + " > ".join(f"{file}:{name}" for file, name in passage.deepest)


if __name__ == "__main__":
    print("\n".join(table()))
