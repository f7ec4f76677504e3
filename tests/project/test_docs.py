"""The documents are right: every example runs, every shell line is valid, every public name is in the reference.

The ```python and ```sh blocks of a page run in order, in one namespace and one empty folder. A ```yaml block that
begins with the name of its file is written there. The first ```python block is pasted line by line, as into a new
Python. What later blocks need besides is shown in a folded block, `<details markdown>`; nothing that runs is hidden. A
`metawrap` line of a ```sh block runs at a small size (`SMALL`), and on other data where its own would have to be
downloaded (`stand_in`). Lines of other programs do not run: their files, extras, commands and make targets must exist,
and `ELSEWHERE` says which test runs the script, or why none does. Blocks of other languages are not tested; ```py is
the code of another library.
"""

from __future__ import annotations

import argparse
import re
import runpy
import shlex
import sys
import warnings
from code import InteractiveConsole
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import matplotlib
import published
import pytest
import torch
from data_helpers import write_zip
from forked import compare_in_forks

import metawrap
import metawrap.data
import metawrap.sklearn
import metawrap.training
from metawrap.cli import main
from metawrap.cli.arguments import build_parser

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
BLOCK = re.compile(r"^```(?P<kind>\w*)[^\n]*\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
FOLDED = re.compile(r"^<details.*?^</details>$", re.MULTILINE | re.DOTALL)
# Appended to each line: the last flag of a name counts.
SMALL = {
    "train": "--epochs 1 --iterations 1 --batch 1 --filters 4 --inner-steps 1 --targets 1 --validation-tasks 2 "
    "--test-tasks 2 --device cpu",
    "compare": "--epochs 1 --budget 1 --batch 1 --filters 4 --validation-tasks 2 --test-tasks 2 --device cpu",
    "evaluate": "--tasks 2",
}
# For a recipe of a page, which is short already.
SMALL_RECIPE = ["ways=3", "targets=1", "tasks_per_batch=1", "inner_steps=1", "backbone=conv4-strided"]
# For one that runs as published.
FULL_RECIPE = ["--epochs", "1", "--iterations", "1", "--validation-tasks", "2", "--test-tasks", "2", "--device", "cpu"]
# Lines that do not run here: the test that runs the script, or why none does.
ELSEWHERE = {
    "examples/wrap_your_cnn.py": "tests/project/test_examples.py",
    "examples/accelerate_loop.py": "tests/project/test_neighbours.py",
    "benchmarks compare": "tests/project/test_benchmarks.py",
    "benchmarks gpu": "tests/project/test_benchmarks.py",
    "adapt": "tests/classifier/test_adapt_predict.py",
    "predict": "tests/classifier/test_adapt_predict.py",
    "pip": "installs packages",
    "make": "runs the tests",
    "tensorboard": "serves until it is stopped; tests/training/test_insight.py reads the files that it shows",
}


@dataclass(frozen=True)
class Block:
    """A block of a page. line: number of its first line of code, from 1."""

    kind: str
    code: str
    line: int
    folded: bool = False


def blocks_of(text: str) -> Iterator[Block]:
    folds = [fold.span() for fold in FOLDED.finditer(text)]
    for match in BLOCK.finditer(text):
        line = text.count("\n", 0, match.start("code")) + 1
        folded = any(start < match.start() < end for start, end in folds)
        yield Block(match["kind"], match["code"], line, folded)


def pages_with(kind: str) -> list[Any]:
    found = [page for page in PAGES if any(block.kind == kind for block in blocks_of(page.read_text()))]
    return [pytest.param(page, id=str(page.relative_to(ROOT))) for page in found]


def run_page(page: Path, text: str) -> None:
    """Runs a page's blocks, in order; an error names the page and its line."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    pasted = False
    for block in blocks_of(text):
        if block.kind == "python" and not pasted:
            assert not block.folded, f"{page}:{block.line}: the first snippet needs what is folded"
            paste(page, block, namespace)
            pasted = True
        elif block.kind == "python":
            run_python(page, block, namespace)
        elif block.kind == "yaml" and (name := re.match(r"# ([\w.-]+\.yaml)\n", block.code)):
            Path(name[1]).write_text(block.code)
        elif block.kind == "sh":
            for number, words in shell_lines(block):
                if (rest := metawrap_words(words)) is not None:
                    run_metawrap(f"{page}:{number}", rest)


class Pasted(InteractiveConsole):
    """A Python that stops at the first error, which it raises as a reader would see it."""

    place = ""

    def showtraceback(self) -> None:
        raise AssertionError(f"{self.place}: {sys.exc_info()[0].__name__}: {sys.exc_info()[1]}")  # type: ignore

    def showsyntaxerror(self, filename: str | None = None, **_: Any) -> None:
        self.showtraceback()


def paste(page: Path, block: Block, namespace: dict[str, Any]) -> None:
    """Feeds a block to a new Python line by line, in which an empty line ends a `for`, a `with`, a `def`."""
    python = Pasted(namespace)
    with redirect_stdout(StringIO()):
        for number, line in enumerate([*block.code.splitlines(), ""], block.line):
            python.place = f"{page}:{number}"
            more = python.push(line)
    assert not more, f"{page}:{block.line}: the snippet is not complete"


def run_python(page: Path, block: Block, namespace: dict[str, Any]) -> None:
    code = "\n" * (block.line - 1) + block.code
    try:
        exec(compile(code, str(page), "exec"), namespace)
    except Exception as error:
        trace, line = error.__traceback__, getattr(error, "lineno", None) or block.line
        while trace is not None:
            line = trace.tb_lineno if trace.tb_frame.f_code.co_filename == str(page) else line
            trace = trace.tb_next
        raise AssertionError(f"{page}:{line}: {type(error).__name__}: {error}") from error


def run_metawrap(place: str, words: list[str]) -> None:
    if words[0] in ELSEWHERE:
        return
    if "--recipe" in words:
        small = [word for each in SMALL_RECIPE for word in ("--set", each)]
        if not any(word.startswith("epochs=") for word in words):
            small += ["--data", "glyphs", "--seed", "0", "--filters", "4", *FULL_RECIPE]
    else:
        small = SMALL.get(words[0], "").split() + stand_in(words)
    if small[-1:] == ["glyphs"] and "--data-root" in words:
        place_of_root = words.index("--data-root")
        words = words[:place_of_root] + words[place_of_root + 2 :]
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", metawrap.MetaWrapWarning)
        code = main([*words, *small])
    assert code == 0, f"{place}: metawrap {' '.join([*words, *small])} ended with {code}"


def stand_in(words: list[str]) -> list[str]:
    """Flags that replace data that would have to be downloaded: files of the published form, or glyphs."""
    data = words[words.index("--data") + 1] if "--data" in words else None
    if data == "mini-imagenet":
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                published, "MINI", {p: [f"n{i}{j:07d}" for j in range(5)] for i, p in enumerate(published.MINI)}
            )
            published.mini_csv(Path("mini"))
        return ["--data-root", "mini"]
    if data == "grocery":
        return ["--data-root", str(write_zip(Path("grocery.zip"), published.grocery_files()))]
    return ["--data", "glyphs"] if words[0] == "train" and data in (None, "omniglot") else []


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if "```python" in page.read_text() or "```sh" in page.read_text()],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_the_examples_of_a_page_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.syspath_prepend(ROOT / "examples")
    matplotlib.use("Agg")
    compare_in_forks(monkeypatch)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        run_page(page, page.read_text())


def test_a_line_that_does_not_run_here_runs_elsewhere() -> None:
    blocks = [block for page in PAGES for block in blocks_of(page.read_text()) if block.kind == "sh"]
    lines = [words for block in blocks for _, words in shell_lines(block)]
    commands = {rest[0] for words in lines if (rest := metawrap_words(words)) and rest[0] in ELSEWHERE}
    assert {script_of(words) for words in lines if metawrap_words(words) is None} | commands == set(ELSEWHERE)
    for script, where in ELSEWHERE.items():
        if where.startswith("tests/"):
            assert script in (ROOT / where).read_text() or Path(script.split()[-1]).stem in (ROOT / where).read_text()


def script_of(words: list[str]) -> str:
    """The script of a line, the command of `python benchmarks`, or the program."""
    if words[:2] == ["python", "benchmarks"]:
        return " ".join(words[1:3])
    return next((word for word in words if word.endswith(".py")), Path(words[0]).name)


def shell_lines(block: Block) -> Iterator[tuple[int, list[str]]]:
    """The number and the words of each line; comments are left out, continued lines joined."""
    waiting, start = "", block.line
    for number, line in enumerate(block.code.splitlines(), block.line):
        start = start if waiting else number
        waiting += line
        if waiting.endswith("\\"):
            waiting = waiting[:-1] + " "
            continue
        words = shlex.split(waiting, comments=True)
        waiting = ""
        if words:
            yield start, words


def metawrap_words(words: list[str]) -> list[str] | None:
    """The arguments of `metawrap`, or of `python -m metawrap`; None for another program."""
    for index, word in enumerate(words):
        if Path(word).name == "metawrap" and (index == 0 or words[index - 1] == "-m"):
            return words[index + 1 :]
    return None


def problem_with(words: list[str]) -> str | None:
    """The error of a line, or None."""
    if (rest := metawrap_words(words)) is not None:
        try:
            build_parser().parse_args(rest)
        except (SystemExit, argparse.ArgumentError) as error:
            return None if isinstance(error, SystemExit) and error.code == 0 else "its flags do not parse"
        return None
    program = Path(words[0]).name
    if program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        wrong = [word for word in words[1:] if "=" not in word and word not in targets]
        return f"the Makefile has no target {wrong}" if wrong else None
    if program in ("pip", "pip3"):
        table = (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")[1].split("\n[")[0]
        extras = re.findall(r"^(\w+) = ", table, re.MULTILINE)
        asked = {name for word in words for names in re.findall(r"\[(.*)\]", word) for name in names.split(",")}
        return f"pyproject.toml has no extra {sorted(asked - set(extras))}" if asked - set(extras) else None
    if words[:2] == ["python", "benchmarks"]:
        known = runpy.run_path(str(ROOT / "benchmarks" / "__main__.py"))["COMMANDS"]
        return None if words[2] in known else f"benchmarks has no command {words[2]}"
    scripts = [word for word in words if word.endswith((".py", ".sh"))]
    if scripts and program in ("python", "bash", "accelerate", "torchrun"):
        missing = [script for script in scripts if not (ROOT / script).exists()]
        return f"there is no {missing}" if missing else None
    return None if program in ("pre-commit", "mkdocs", "tensorboard") else "this test does not know the program"


@pytest.mark.parametrize("page", pages_with("sh"))
def test_every_shell_line_of_a_page_is_understood(page: Path) -> None:
    blocks = [block for block in blocks_of(page.read_text()) if block.kind == "sh"]
    lines = [(number, words) for block in blocks for number, words in shell_lines(block)]
    wrong = [f"{page}:{number}: {words}: {problem}" for number, words in lines if (problem := problem_with(words))]
    assert lines
    assert not wrong, "\n".join(wrong)


def test_a_failing_example_is_reported_with_its_page_and_line() -> None:
    text = "# A page\n\n```python\nx = 1\n```\n\ntext\n\n```python\ny = x\nassert y == 2, 'no'\n```\n"
    with pytest.raises(AssertionError, match=r"page\.md:11: AssertionError: no"):
        run_page(Path("page.md"), text)
    with pytest.raises(AssertionError, match=r"page\.md:4: SyntaxError"):
        run_page(Path("page.md"), "\n\n```python\nx = = 1\n```\n")
    with pytest.raises(AssertionError, match=r"page\.md:2: metawrap recipes no-such-recipe ended with 2"):
        run_page(Path("page.md"), "```sh\nmetawrap recipes no-such-recipe\n```\n")


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("x = model\n", r"page\.md:4: NameError: name 'model'"),
        ("for i in range(2):\n    x = i\ny = x\n", r"page\.md:6: SyntaxError"),
        ("def f():\n    x = 1\n\n    return x\n", r"page\.md:7: IndentationError"),
        ("f(\n", "not complete"),
    ],
)
def test_a_first_snippet_that_cannot_be_pasted_is_found(code: str, found: str) -> None:
    with pytest.raises(AssertionError, match=found):
        run_page(Path("page.md"), f"# A page\n\n```python\n{code}```\n")


def test_nothing_that_runs_is_hidden() -> None:
    assert not [str(page) for page in PAGES if re.search(r"<!--", page.read_text())]
    folded = "<details markdown>\n<summary>Setup</summary>\n\n```python\nmodel = 1\n```\n\n</details>\n"
    with pytest.raises(AssertionError, match=r"page\.md:5: the first snippet needs what is folded"):
        run_page(Path("page.md"), folded)
    run_page(Path("page.md"), f"```python\nx = 1\n```\n\n{folded}\n```python\nassert model == x\n```\n")


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().split()) <= 1200


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("metawrap train --no-such-flag", "do not parse"),
        ("torchrun --nproc-per-node=2 -m metawrap tarin", "do not parse"),
        ("metawrap train --epochs 3", None),
        ("make no-such-target", "no target"),
        ('pip install ".[no-such-extra]"', "no extra"),
        ("python examples/none.py", "there is no"),
        ("python benchmarks race", "no command"),
        ("rm -rf runs", "does not know"),
    ],
)
def test_a_wrong_shell_line_is_found(line: str, problem: str | None) -> None:
    found = problem_with(shlex.split(line))
    assert (found is None) if problem is None else (found is not None and problem in found)


def test_every_public_name_is_in_the_reference() -> None:
    text = "\n".join(page.read_text() for page in (DOCS / "reference").glob("*.md"))
    shown = set(re.findall(r"^::: ([\w.]+)$", text, re.MULTILINE)) | set(re.findall(r"`(metawrap[\w.]+)`", text))
    names = {f"metawrap.{name}" for name in metawrap.__all__}
    names |= {f"metawrap.data.{name}" for name in metawrap.data.__all__}
    names |= {f"metawrap.training.{name}" for name in metawrap.training.__all__}
    names |= {"metawrap.sklearn.FewShotClassifier"}
    assert not names - shown


def test_the_reference_has_a_row_for_each_keyword() -> None:
    griffe = pytest.importorskip("griffe")
    rows = runpy.run_path(str(DOCS / "reference_rows.py"))
    read = griffe.load("metawrap", search_paths=[str(ROOT)], extensions=griffe.load_extensions(rows["ReferenceRows"]))
    shown = read["methods.maml.MAMLPlusPlus"]
    assert (shown.parameters["inner_steps"].default, shown.parameters["preset"].default) == ("5", "'inductive'")
    assert {"multi_step_loss: ", "msl_epochs: "} <= set(
        re.findall(r"^    (\w+: )", shown.docstring.value, re.MULTILINE)
    )
    assert read["methods.maml.FOMAML"].parameters["first_order_epochs"].default == "inf"
    assert str(read["settings.groups.ExecutionOptions"].parameters["workers"].annotation) == "int | Literal['auto']"


def test_every_page_and_picture_is_reached() -> None:
    nav = (ROOT / "mkdocs.yml").read_text()
    pages = [str(page.relative_to(DOCS)) for page in [*DOCS.rglob("*.md"), *DOCS.glob("*.ipynb")]]
    assert not [page for page in pages if page not in nav]
    text = "\n".join(page.read_text() for page in PAGES)
    assert not [picture.name for picture in (DOCS / "images").iterdir() if picture.name not in text]


@pytest.mark.slow
def test_the_notebook_runs_and_is_stored_without_output(tmp_path: Path) -> None:
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    notebook = nbformat.read(DOCS / "notebook.ipynb", as_version=4)
    assert not [cell for cell in notebook.cells if cell.get("outputs")]
    for cell in notebook.cells:  # A smaller size.
        for shown, small in {"META_STEPS = 40": "META_STEPS = 20", "tasks_per_batch=20": "tasks_per_batch=8"}.items():
            cell.source = cell.source.replace(shown, small)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the kernel's own connection
        nbclient.NotebookClient(notebook, timeout=120, resources={"metadata": {"path": tmp_path}}).execute()
    text = "".join(o.get("text", "") for cell in notebook.cells for o in cell.get("outputs", []))
    accuracy = {
        moment: float(value) for moment, value in re.findall(r"(before|after) training: .*?accuracy ([\d.]+) %", text)
    }
    assert accuracy["after"] > accuracy["before"] > 0
    kinds = [kind for cell in notebook.cells for o in cell.get("outputs", []) for kind in o.get("data", {})]
    assert kinds.count("image/png") == 2
