"""Every network of the zoo under every engine: the gradient of a plain float64 loop, or a refusal that says why.

The plain loop's gradient is held against finite differences of its loss.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from importlib.util import find_spec
from typing import Any

import pytest
from entry import Entry, check, check_evaluation
from hugging_face import HUGGING_FACE
from not_derivatives import IN_FLOAT32, REASONS
from patterns import PATTERNS
from torchvision_nets import TORCHVISION, builders_below_limit

ENTRIES: list[Entry] = [*PATTERNS, *TORCHVISION, *HUGGING_FACE]
# Evaluation has no second derivatives to get wrong: the large ones need not repeat it.
EVALUATED = [entry for entry in [*PATTERNS, *HUGGING_FACE] if entry.refused is None]
EVALUATED += [entry for entry in TORCHVISION if entry.quick]


def _marks(entry: Entry) -> list[Any]:
    absent = bool(entry.needs) and find_spec(entry.needs) is None
    needed = pytest.mark.skipif(absent, reason=f"{entry.needs} is not installed: pip install -e '.[test,zoo]'")
    return [needed] if entry.quick else [needed, pytest.mark.zoo]


def _cases() -> list[Any]:
    small = set(PATTERNS)  # The others take too long for a run by default.
    return [
        pytest.param(entry, engine, id=f"{entry.name}-{engine}", marks=[*_marks(entry), *more])
        for entry in ENTRIES
        for engine in ("functional", "higher", "differences")
        for more in [[pytest.mark.zoo] if engine == "differences" and entry not in small else []]
    ]


def test_names_are_unique_and_reasons_are_of_networks_that_are_here() -> None:
    names = {entry.name for entry in ENTRIES}
    assert len(names) == len(ENTRIES)
    assert names >= {*REASONS, *IN_FLOAT32}


def test_every_small_classifier_of_torchvision_is_here() -> None:
    assert builders_below_limit() - {entry.name for entry in TORCHVISION} == set()


@pytest.mark.sampled(24)
@pytest.mark.filterwarnings("ignore::metawrap.MetaWrapWarning")
@pytest.mark.parametrize(("entry", "engine"), _cases())
def test_meta_gradient_equals_the_plain_loop(
    entry: Entry, engine: str, record_property: Callable[[str, object], None]
) -> None:
    start = time.perf_counter()
    outcome = check(entry, engine)
    record_property("outcome", {**asdict(outcome), "seconds": time.perf_counter() - start})


@pytest.mark.zoo
@pytest.mark.filterwarnings("ignore::metawrap.MetaWrapWarning")
@pytest.mark.parametrize("entry", [pytest.param(entry, id=entry.name, marks=_marks(entry)) for entry in EVALUATED])
def test_meta_gradient_in_threads_equals_the_plain_loop(entry: Entry) -> None:
    check(entry, "threads")


@pytest.mark.sampled(40)
@pytest.mark.filterwarnings("ignore::metawrap.MetaWrapWarning")
@pytest.mark.parametrize("entry", [pytest.param(entry, id=entry.name, marks=_marks(entry)) for entry in EVALUATED])
def test_evaluation_and_adapted_modules_equal_the_plain_loop(entry: Entry) -> None:
    check_evaluation(entry, "functional")
