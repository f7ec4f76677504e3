"""The room as its `__init__` describes it: examples run, and imports go down its floors."""

from __future__ import annotations

import ast
import doctest
import importlib
from pathlib import Path

import pytest

import metawrap.data

ROOM = Path(metawrap.data.__file__).parent
MODULES = {path.stem: path for path in ROOM.glob("*.py") if path.stem != "__init__"}
# A floor is an indented line of the docstring.
FLOORS = [line.split(", ") for line in str(metawrap.data.__doc__).split("\n    ")[1:]]
FLOOR = {name.strip(): number for number, names in enumerate(FLOORS) for name in names}


@pytest.mark.parametrize("module", MODULES)
def test_examples_run(module: str) -> None:
    assert doctest.testmod(importlib.import_module(f"metawrap.data.{module}")).failed == 0


def test_imports_go_down() -> None:
    assert set(FLOOR) == set(MODULES)
    for module, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("metawrap.data."):
                assert FLOOR[str(node.module).split(".")[2]] > FLOOR[module], f"{module} imports {node.module}"
