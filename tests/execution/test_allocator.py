"""The allocator keeps what is freed when it is told to, from the first meta-step on, and not before."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's allocator is told anything")

PROGRAM = """
import resource, sys
import torch
from metawrap import MAMLPlusPlus
from metawrap.execution.allocator import keep_memory

def faults_of_taking_and_freeing():
    for _ in range(2):
        torch.empty(16_000_000).fill_(1.0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.empty(16_000_000).fill_(1.0)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

learner = MAMLPlusPlus(torch.nn.Linear(2, 2), inner_steps=1, execution={"allocator": sys.argv[1] == "True"})
x, y = torch.randn(1, 2, 2), torch.tensor([[0, 1]])
print(faults_of_taking_and_freeing())
learner.evaluate((x, y, x, y))
print(faults_of_taking_and_freeing())
learner.meta_step((x, y, x, y))
print(faults_of_taking_and_freeing(), keep_memory())
"""
PAGES = 5 * 16_000_000 * 4 // 4096


def run(allocator: bool, **environment: str) -> list[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    # Huge pages would hide the faults that are counted.
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(allocator)],
        env=clean | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.split()


def test_memory_is_kept_from_the_first_meta_step_on() -> None:
    imported, evaluated, trained, done = run(allocator=True)
    if int(imported) < PAGES // 100:
        pytest.skip("this system hands out pages so large that faults say nothing")
    assert int(evaluated) > int(imported) // 2
    assert int(trained) < int(imported) // 20
    assert done == "True"


def test_it_can_be_left_as_it_is() -> None:
    imported, _, trained, _ = run(allocator=False)
    assert int(trained) > int(imported) // 2


def test_what_the_environment_says_about_the_allocator_stands() -> None:
    imported, _, trained, done = run(allocator=True, MALLOC_ARENA_MAX="2")
    assert int(trained) > int(imported) // 2
    assert done == "False"


def test_other_settings_of_glibc_do_not_stand_in_its_way_but_its_own_do() -> None:
    imported, _, trained, done = run(allocator=True, GLIBC_TUNABLES="glibc.malloc.tcache_count=0")
    if int(imported) < PAGES // 100:
        pytest.skip("this system hands out pages so large that faults say nothing")
    assert int(trained) < int(imported) // 20
    assert done == "True"
    *_, done = run(allocator=True, GLIBC_TUNABLES="glibc.malloc.tcache_count=0:glibc.malloc.trim_threshold=1000000")
    assert done == "False"
