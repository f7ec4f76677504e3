"""One thread for all tests: on small tensors it is faster, and two busy processes with two threads each crawl.

No convolution is too small for the quick form here, so that all networks are tried in it. Glyphs are drawn once in a
process: a data set takes a second.
"""

import functools
import os
import random
import shutil
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from bird_runs import FLAGS, MAML, write_birds

from metawrap.cli import main
from metawrap.data import glyphs
from metawrap.layers import quick_forms

torch.set_num_threads(1)
# pytest-xdist tells its workers the width of a terminal, which the library would follow.
os.environ.pop("COLUMNS", None)
quick_forms.LARGE = quick_forms.LARGE_AT_BEST = quick_forms.LARGE_POOLING = quick_forms.LARGE_NORM = 0
glyphs.draw_class = functools.lru_cache(10_000)(glyphs.draw_class)


@pytest.hookimpl(tryfirst=True)  # Before pytest leaves out what is slow.
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks as slow all cases of a function with `sampled(count)`, except `count` that its name draws.

    They are drawn, and not every tenth, because a step may always meet the same value of one parameter.
    """
    cases = defaultdict[str, list[tuple[pytest.Item, int]]](list)
    for item in items:
        if (mark := item.get_closest_marker("sampled")) and not item.get_closest_marker("zoo"):
            cases[item.nodeid.partition("[")[0]].append((item, mark.args[0]))
    for name, found in cases.items():
        for item, _ in random.Random(name).sample(found, max(0, len(found) - found[0][1])):
            item.add_marker("slow")


@pytest.fixture(scope="session")
def trained_on_birds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the data set `birds`, and the finished runs `run` (ProtoNet) and `maml` on it."""
    folder = tmp_path_factory.mktemp("trained")
    write_birds(folder / "birds")
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng():
        patch.chdir(folder)
        assert main(["train", *FLAGS, "--out", "run"]) == 0
        assert main(["train", *MAML, "--out", "maml"]) == 0
    return folder


@pytest.fixture
def place(trained_on_birds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of `trained_on_birds`, which is the present folder."""
    shutil.copytree(trained_on_birds, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng():
        yield tmp_path
