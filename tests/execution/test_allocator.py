"""The allocator keeps what is freed when it is told to, from the first meta-step on, and not before."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's allocator is told anything")

# For each case a forked process: importing torch costs seconds. Below 32 MiB glibc itself would keep what is freed.
PROGRAM = """
import json, os, resource, sys
import torch
from metawrap import MAMLPlusPlus
from metawrap.execution.allocator import keep_memory

torch.set_num_threads(1)

def faults_of_taking_and_freeing():
    for _ in range(2):
        torch.empty(9_000_000).fill_(1.0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(3):
        torch.empty(9_000_000).fill_(1.0)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def made(allocator):
    return MAMLPlusPlus(torch.nn.Linear(2, 2), inner_steps=1, execution={"allocator": allocator})

x, y = torch.randn(1, 2, 2), torch.tensor([[0, 1]])
made(False).meta_step((x, y, x, y))  # Imports what a first meta-step imports.

def run(allocator, environment):
    os.environ.update(environment)
    learner = made(allocator)
    found = [faults_of_taking_and_freeing()]
    learner.evaluate((x, y, x, y))
    found.append(faults_of_taking_and_freeing())
    learner.meta_step((x, y, x, y))
    return [*found, faults_of_taking_and_freeing(), keep_memory()]

for name, case in json.loads(sys.argv[1]).items():
    sys.stdout.flush()
    if os.fork() == 0:
        print(json.dumps([name, run(*case)]), flush=True)
        os._exit(0)
    os.wait()
"""
PAGES = 3 * 9_000_000 * 4 // 4096
CASES = {
    "kept": (True, {}),
    "left": (False, {}),
    "said": (True, {"MALLOC_ARENA_MAX": "2"}),
    "other tunable": (True, {"GLIBC_TUNABLES": "glibc.malloc.tcache_count=0"}),
    "own tunable": (True, {"GLIBC_TUNABLES": "glibc.malloc.tcache_count=0:glibc.malloc.trim_threshold=1000000"}),
}


@pytest.fixture(scope="module")
def found() -> dict[str, list[int]]:
    """For each case: page faults after the import, after an evaluation, after a meta-step; whether memory is kept."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    # Huge pages would hide the faults that are counted.
    command = [sys.executable, "-c", PROGRAM, json.dumps(CASES)]
    done = subprocess.run(command, env=clean, capture_output=True, text=True, check=True)
    return dict(json.loads(line) for line in done.stdout.splitlines())


@pytest.mark.slow
@pytest.mark.parametrize("case", ["kept", "other tunable"])
def test_memory_is_kept_from_the_first_meta_step_on(case: str, found: dict[str, list[int]]) -> None:
    imported, evaluated, trained, done = found[case]
    if imported < PAGES // 100:
        pytest.skip("this system hands out pages so large that faults say nothing")
    assert evaluated > imported // 2
    assert trained < imported // 20
    assert done


@pytest.mark.sampled(1)
@pytest.mark.parametrize("case", ["left", "said"])
def test_memory_is_left_as_it_is_where_that_is_asked_for_or_the_environment_says_so(
    case: str, found: dict[str, list[int]]
) -> None:
    imported, _, trained, done = found[case]
    assert trained > imported // 2
    assert case == "left" or not done


def test_settings_of_its_own_in_glibcs_tunables_stand(found: dict[str, list[int]]) -> None:
    assert not found["own tunable"][-1]
