"""What a person sees while a run trains: a bar on one line in a terminal, else one plain line per epoch."""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

from metawrap.results import StepMetrics
from metawrap.training.launch import rank

REFRESH_SECONDS = 0.5
# The loss and accuracy shown are means over so many meta-steps: a single one has too few targets to be steady.
STEPS_SHOWN = 20


# Not a context variable: threads that are started inside `quiet` are quiet as well.
_quiet = False


@contextmanager
def quiet(on: bool = True) -> Iterator[None]:
    """Inside it, in all threads, no progress is shown and nothing is said; errors still are."""
    global _quiet
    before, _quiet = _quiet, _quiet or on
    try:
        yield
    finally:
        _quiet = before


class Progress:
    """Progress of a whole run, on stderr. Use as a context manager, so that the line is closed on errors as well.

    Args:
        epochs: of the whole run.
        iterations_per_epoch: meta-steps of one epoch.
        done: epochs that were finished before this start.
        shown: whether this process is the one that a person watches.
    """

    def __init__(self, epochs: int, iterations_per_epoch: int, done: int = 0, shown: bool = True) -> None:
        self.epochs = epochs
        self._start = time.monotonic()
        self._seen = 0
        self._shown = shown and not _quiet
        self._last_epoch: str | None = None
        self._recent: deque[StepMetrics] = deque(maxlen=STEPS_SHOWN)
        self._bar = tqdm(
            desc=f"epoch {min(done + 1, epochs)}/{epochs}",
            total=epochs * iterations_per_epoch,
            initial=done * iterations_per_epoch,
            disable=not (self._shown and sys.stderr.isatty()),
            mininterval=REFRESH_SECONDS,
            ncols=_columns(),
            bar_format="{desc} {percentage:3.0f}% |{bar}| {remaining} left{postfix}",
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def start_epoch(self, epoch: int) -> None:
        """`epoch` counts from 0."""
        self._bar.set_description_str(f"epoch {epoch + 1}/{self.epochs}", refresh=False)

    def step(self, metrics: StepMetrics) -> None:
        """After each meta-step. Reads the metrics only when the line is redrawn: on a GPU each reading waits for it."""
        self._recent.append(metrics)
        if self._bar.update(1):
            loss = sum(each.loss for each in self._recent) / len(self._recent)
            accuracy = sum(each.accuracy or 0.0 for each in self._recent) / len(self._recent)
            postfix = f"loss {_number(loss)}, accuracy {percent(accuracy)}"
            self._bar.ncols = _columns()  # It may have been made narrower.
            self._bar.set_postfix_str(", ".join(filter(None, [postfix, self._last_epoch])), refresh=False)

    def end_epoch(self, record: dict[str, Any]) -> None:
        """After validation; `record` is the epoch's line of the log."""
        interval = percent(record["validation_interval"])
        self._last_epoch = f"validation {percent(record['validation_accuracy'])}"
        if not self._shown or not self._bar.disable:
            return
        self._seen += 1
        left = (time.monotonic() - self._start) / self._seen * (self.epochs - record["epoch"])
        print(
            f"epoch {record['epoch']}/{self.epochs}: loss {_number(record['train_loss'])}, "
            f"accuracy {percent(record['train_accuracy'])}, {self._last_epoch} ± {interval}, {duration(left)} left",
            file=sys.stderr,
            flush=True,
        )


def percent(fraction: float | None) -> str:
    """0.9765 as '97.7 %'."""
    return "none" if fraction is None else f"{100 * fraction:.1f} %"


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.3f}"


def duration(seconds: float) -> str:
    """A length of time in words: '45 s', '3 min 20 s', '2 h 5 min'."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def say(text: str, error: bool = False) -> None:
    """One line for the person who watches, from one process; results go to stdout, everything else to stderr.

    Above the bar if there is one, which stays on its line.

    Args:
        error: is said even where nothing else is.
    """
    if rank() == 0 and (error or not _quiet):
        tqdm.write(text, file=sys.stderr)
        sys.stderr.flush()


def _columns() -> int:
    """The width of the bar: one column less than the terminal's, since some break the line behind a full one."""
    try:
        columns = os.get_terminal_size(sys.stderr.fileno()).columns
    except (OSError, ValueError):  # No terminal, or one without a size.
        columns = 0
    return (columns or 80) - 1
