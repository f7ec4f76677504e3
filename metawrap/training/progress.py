"""The output of a run while it trains: a bar on one line in a terminal, else one plain line per epoch."""

from __future__ import annotations

import logging
import math
import os
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from tqdm import tqdm

from metawrap.errors import printable
from metawrap.results import StepMetrics
from metawrap.training.torchrun import rank

REFRESH_SECONDS = 0.5
# The bar shows means over so many meta-steps: one meta-step has too few targets for a steady number.
STEPS_SHOWN = 20
# From so many columns on the bar shows the loss beside the accuracy.
WIDE = 100

# A plain global, not a context variable: threads that start inside `quiet` are quiet as well.
_quiet = False


@contextmanager
def quiet(on: bool = True) -> Iterator[None]:
    """Inside the block no thread prints progress or messages; errors are still printed."""
    global _quiet
    before, _quiet = _quiet, _quiet or on
    try:
        yield
    finally:
        _quiet = before


def say(text: str, error: bool = False) -> None:
    """Prints one line on stderr, above the bar if there is one, on rank 0 alone. Results go to stdout instead. A stderr
    that is closed or full stops nothing.

    Args:
        error: also print inside `quiet`.
    """
    if rank() == 0 and (error or not _quiet) and sys.stderr is not None:
        with suppress(OSError, ValueError):  # The latter: a closed file.
            # Else tqdm.write, interrupted before it has the lock, releases it, and that error replaces the interrupt.
            with tqdm.get_lock():
                tqdm.write(printable(text), file=sys.stderr, nolock=True)
            sys.stderr.flush()


@contextmanager
def saying_logs() -> Iterator[None]:
    """Prints metawrap's log messages of level INFO and above as progress lines, inside the block."""
    logger, handler = logging.getLogger("metawrap"), logging.Handler()
    handler.emit = lambda record: say(record.getMessage())  # type: ignore[method-assign]
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


class Progress:
    """The progress of a whole run on stderr. A context manager, so that an error closes the line as well.

    Args:
        epochs: epochs of the whole run.
        iterations_per_epoch: meta-steps of one epoch.
        done: epochs that were finished before this start.
        shown: whether this process prints.
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
            disable=not (self._shown and sys.stderr is not None and sys.stderr.isatty()),
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
        """Counts a meta-step. Reads the metrics only when the bar is redrawn: each reading waits for a GPU."""
        self._recent.append(metrics)
        if self._bar.update(1):
            loss = sum(each.loss for each in self._recent) / len(self._recent)
            known = [each.accuracy for each in self._recent if each.accuracy is not None]
            accuracy = f"accuracy {percent(sum(known) / len(known))}" if known else None
            self._bar.ncols = _columns()  # The user may have resized the terminal.
            # A narrow terminal has no room for both figures and a bar.
            shown = None if accuracy and self._bar.ncols < WIDE else f"loss {_number(loss)}"
            self._bar.set_postfix_str(", ".join(filter(None, [shown, accuracy, self._last_epoch])), refresh=False)

    def end_epoch(self, record: dict[str, Any]) -> None:
        """Call after validation, with the epoch's line of the log."""
        interval = ""
        trained = "" if record["train_accuracy"] is None else f", accuracy {percent(record['train_accuracy'])}"
        if (accuracy := record["validation_accuracy"]) is None:
            known = "validation_loss" in record
            self._last_epoch = f"validation loss {_number(record['validation_loss'])}" if known else "no validation"
        else:
            self._last_epoch = f"validation {percent(accuracy)}"
            if (spread := record["validation_interval"]) is not None and not math.isnan(spread):  # of one task
                interval = f" ± {percent(spread)}"
        if not self._shown or not self._bar.disable:
            return
        self._seen += 1
        left = (time.monotonic() - self._start) / self._seen * (self.epochs - record["epoch"])
        say(
            f"epoch {record['epoch']}/{self.epochs}: loss {_number(record['train_loss'])}{trained}, "
            f"{self._last_epoch}{interval}, {duration(left)} left"
        )


def percent(fraction: float | None) -> str:
    """0.9765 as '97.7 %'."""
    return "none" if fraction is None else f"{100 * fraction:.1f} %"


def duration(seconds: float) -> str:
    """A duration in words: '45 s', '3 min 20 s', '2 h 5 min'."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if minutes else f"{rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.3f}"


def _columns() -> int:
    """One column less than the terminal has: some terminals start a new line after a full one."""
    try:
        columns = os.get_terminal_size(sys.stderr.fileno()).columns
    except (OSError, ValueError):  # No terminal, or one without a size.
        columns = 0
    return (columns or 80) - 1
