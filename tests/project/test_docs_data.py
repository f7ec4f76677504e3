"""docs/data.md is run as it stands: its Python from top to bottom, and what it prints of the shell is compared."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from metawrap.cli import main
from metawrap.cli.arguments import build_parser

PAGE = Path(__file__).parents[2] / "docs" / "data.md"
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def test_every_example_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    printed, compared = "", 0
    for kind, text in BLOCKS:
        if kind == "python":
            exec(compile(text, str(PAGE), "exec"), names)
        elif kind == "sh":
            for line in text.splitlines():
                words = shlex.split(line)
                build_parser().parse_args(words[1:])
                if "data check" in line:  # test_docs.py runs the others.
                    assert main(words[1:]) == 0
                    printed = capsys.readouterr().out
        else:
            for expected, line in zip(text.splitlines(), printed.splitlines(), strict=True):
                assert expected.split()[:3] == line.split()[:3]
                assert expected.startswith("Train on it") or expected.split() == line.split()
            compared += 1
    assert compared == 1
    assert sum(kind == "python" for kind, _ in BLOCKS) == 7
    assert (tmp_path / "contact-sheet.png").exists()
