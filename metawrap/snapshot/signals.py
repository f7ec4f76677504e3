"""Ctrl-C and SIGTERM, held back while state is half changed."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def signals_deferred() -> Iterator[Callable[[], None]]:
    """Delays both signals from the call of the function that it yields until the block ends, and raises them then."""
    received: list[int] = []
    before: dict[int, Any] = {}

    def defer() -> None:
        if threading.current_thread() is threading.main_thread():  # Other threads get no signals.
            for number in (signal.SIGINT, signal.SIGTERM):
                if (handler := signal.getsignal(number)) is not None:
                    before[number] = handler
                    signal.signal(number, lambda number, _: received.append(number))

    try:
        yield defer
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if received:
            signal.raise_signal(received[0])
