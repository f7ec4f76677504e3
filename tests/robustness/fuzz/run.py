"""Runs one fuzzing harness, or all, for some seconds each: python tests/robustness/fuzz/run.py NAME --seconds 120."""

from __future__ import annotations

import argparse
import contextlib
import random
import resource
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
FOUND = HERE / "found"
MEMORY_MIB = 1024
# What no reader has any business to do, as Python's audit hooks tell it.
FORBIDDEN = ("os.system", "subprocess.Popen", "os.exec", "os.fork", "os.posix_spawn", "socket.", "shutil.", "ctypes.")


class ExecutedError(BaseException):
    """A reader was made to do something; no `except Exception` hides it."""


def watch(active: list[bool], folder: Path) -> None:
    """Raises, while a reader is active, on what a hostile file would want of it; `folder` is where inputs are put."""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if not active[0]:
            return
        opened = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
        if opened and str(arguments[0]).startswith(str(folder)):
            return
        if event.startswith(FORBIDDEN) or event in ("os.mkdir", "os.remove", "os.rename", "os.symlink") or opened:
            raise ExecutedError(f"{event} {arguments!r}"[:200])

    sys.addaudithook(hook)


def one_input(run: Callable[[bytes], object], active: list[bool]) -> Callable[[bytes], None]:
    """A function of bytes that lets only metawrap's own errors through."""
    from metawrap.errors import MetaWrapError

    def test(content: bytes) -> None:
        active[0] = True
        try:
            run(content)
        except MetaWrapError:
            pass
        finally:
            active[0] = False

    return test


def mutated(seeds: list[bytes], generator: random.Random) -> bytes:
    """One of the seeds with some bytes changed, cut out, doubled or taken from another."""
    content = bytearray(generator.choice(seeds))
    for _ in range(generator.randint(1, 6)):
        place = generator.randrange(len(content) + 1)
        kind = generator.randrange(4)
        if kind == 0 and place < len(content):
            content[place] ^= 1 << generator.randrange(8)
        elif kind == 1:
            content[place:place] = generator.randbytes(generator.randint(1, 8))
        elif kind == 2:
            del content[place : place + generator.randint(1, 16)]
        else:
            donor = generator.choice(seeds)
            start = generator.randrange(len(donor) + 1)
            content[place : place + 8] = donor[start : start + 8]
    return bytes(content)


def mutate(test: Callable[[bytes], None], seeds: list[bytes], seconds: float, name: str) -> None:
    """Without guidance: as many mutations as fit into the seconds."""
    generator, begun, count = random.Random(0), time.monotonic(), 0
    while time.monotonic() - begun < seconds:
        content = mutated(seeds, generator)
        try:
            test(content)
        except BaseException:
            (FOUND / f"{name}-{count}").write_bytes(content)
            raise
        count += 1
    print(f"{name}: {count} executions, {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024} MiB at most")


def main() -> int:
    """Returns 0 where nothing was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name")
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--mutate", action="store_true", help="without atheris")
    given = parser.parse_args()
    FOUND.mkdir(exist_ok=True)
    if not given.mutate:
        import atheris

        with atheris.instrument_imports(include=["metawrap", "zipfile", "tarfile", "pickletools", "csv"]):
            from harnesses import FOLDER, HARNESSES
    else:
        from harnesses import FOLDER, HARNESSES
    from metawrap.errors import MetaWrapError

    if given.name == "all":
        names = [name for name, harness in HARNESSES.items() if harness.available]
        more = ["--mutate"] * given.mutate
        runs = [
            subprocess.run([sys.executable, __file__, name, "--seconds", str(given.seconds), *more]) for name in names
        ]
        return max(run.returncode for run in runs)
    harness = HARNESSES[given.name]
    if not harness.available:
        print(f"{given.name}: this metawrap has no {harness.needs}")
        return 0
    warnings.simplefilter("ignore")
    active = [False]
    watch(active, FOLDER)
    test = one_input(harness.run, active)
    seeds = list(harness.seeds())
    for seed in seeds:  # What is imported late is imported now.
        with contextlib.suppress(MetaWrapError):
            harness.run(seed)
    if given.mutate:
        mutate(test, seeds, given.seconds, given.name)
        return 0
    corpus = HERE / "corpus" / given.name
    corpus.mkdir(parents=True, exist_ok=True)
    for place, seed in enumerate(seeds):
        (corpus / f"seed-{place}").write_bytes(seed)
    options = [
        f"-max_total_time={given.seconds}",
        f"-rss_limit_mb={MEMORY_MIB + 1024}",
        "-max_len=16384",
        "-timeout=20",
    ]
    options += [f"-artifact_prefix={FOUND}/{given.name}-", "-print_final_stats=1", str(corpus)]
    atheris.Setup([sys.argv[0], *options], test)
    atheris.Fuzz()
    return 0


if __name__ == "__main__":
    sys.exit(main())
