"""Texts for the terminal: control characters as escapes, and a stdout or stderr that fails stops no work."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from metawrap.errors import printable
from metawrap.training.progress import say


def show(text: str) -> None:
    """Prints a text that may hold names from files."""
    print(printable(text))


@contextmanager
def work_is_done(where: Path) -> Iterator[None]:
    """Prints in the block follow finished work, whose result is in a file: if they fail, that is said, no more."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        silence(sys.stdout)
        say(f"The output could not be printed ({error.strerror}). The work is done: {where}", error=True)


@contextmanager
def usable_streams() -> Iterator[None]:
    """Inside the block, a stdout or stderr that is closed keeps nothing, and one in ASCII prints escapes."""
    with ExitStack() as stack:
        for name in ("stdout", "stderr"):
            stream = getattr(sys, name)
            if stream is None:
                stack.callback(setattr, sys, name, None)
                setattr(sys, name, stack.enter_context(open(os.devnull, "w", encoding="utf-8")))
            elif hasattr(stream, "reconfigure"):
                stack.callback(_set_errors, stream, stream.errors)
                _set_errors(stream, "backslashreplace")
        yield


def silence(stream: Any) -> None:
    """Leads a stream that fails nowhere: Python's own last flush would fail again, and so the whole command."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _set_errors(stream: Any, errors: str) -> None:
    try:
        stream.reconfigure(errors=errors)
    except OSError:  # It flushes what could not be written.
        silence(stream)
        with suppress(OSError):
            stream.reconfigure(errors=errors)
