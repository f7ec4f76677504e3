"""The layout of design.md, as a test: imports point down, and nothing is called utils."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import metawrap

ROOT = Path(metawrap.__file__).parent
# The layer of a module is that of its longest prefix here. 0 to 2 are the library, 3 runs it, 4 is the command line.
# From the bottom up; a room may import those before it, and modules of its own.
ORDER = [
    "errors", "templates",
    "tasks", "results", "layers", "surgery", "snapshot", "inner_loop.update_rules", "engines", "settings",
    "inner_loop", "heads", "checks", "outer_update", "execution", "learner", "methods", "data", "backbones",
    "training", "sklearn", "recipes", "report", "cli", "__main__",
]  # fmt: skip


def _modules() -> dict[str, Path]:
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = _modules()


def _imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in MODULES else str(node.module) for name in names)


def _home(module: str) -> str:
    return max((known for known in ORDER if f"{module}.".startswith(f"metawrap.{known}.")), key=len, default="")


def _allowed(ours: str, theirs: str) -> bool:
    if theirs == "metawrap":  # `from metawrap import __version__`
        return ORDER.index(ours) > ORDER.index("methods")
    return ORDER.index(theirs) <= ORDER.index(ours)


def test_every_module_has_a_layer() -> None:
    assert [module for module in MODULES if module != "metawrap" and not _home(module)] == []


def test_imports_point_down() -> None:
    wrong = [
        f"{module} imports {imported}"
        for module, path in MODULES.items()
        for imported in sorted(set(_imports(path)))
        if module != "metawrap" and imported.split(".")[0] == "metawrap"
        if not _allowed(_home(module), _home(imported) or "metawrap")
    ]
    assert not wrong, "\n".join(wrong)


def test_modules_of_a_folder_do_not_import_in_a_circle() -> None:
    edges = {
        module: {name for name in _imports(path) if name in MODULES and name not in {module, "metawrap"}}
        for module, path in MODULES.items()
        if path.name != "__init__.py"
    }
    edges = {module: {name for name in names if name in edges} for module, names in edges.items()}
    while leaves := {module for module, names in edges.items() if not names}:
        edges = {module: names - leaves for module, names in edges.items() if module not in leaves}
    assert not edges, f"in or behind a circle: {sorted(edges)}"


def test_nothing_is_called_utils() -> None:
    assert not [name for name in MODULES if {"utils", "util", "helpers", "common", "misc"} & set(name.split("."))]


def test_public_names_are_importable_and_documented() -> None:
    assert {"MAMLPlusPlus", "MAML", "FOMAML", "Task", "TaskBatch"} <= set(metawrap.__all__)
    for name in metawrap.__all__:
        value = getattr(metawrap, name)
        assert not isinstance(value, type) or value.__doc__, name


@pytest.mark.parametrize("module", MODULES)
def test_module_says_what_it_is(module: str) -> None:
    assert ast.get_docstring(ast.parse(MODULES[module].read_text())) or not MODULES[module].read_text().strip()


def test_nothing_in_the_package_imports_the_tests_or_the_oracle() -> None:
    for module, path in MODULES.items():
        assert not {"oracle", "tests", "pytest"} & {name.split(".")[0] for name in _imports(path)}, module
