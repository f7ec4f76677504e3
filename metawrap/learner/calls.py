"""Who may use a learner's modules now: a call that learns is alone; calls that do not learn share.

A call that does not learn (`adapt`, `evaluate`, `forward` in eval mode) lends fast weights to the modules, moves the
inner-step clock and sets training flags. From one thread it uses the learner's own modules. Once calls of several
threads have met, each call has a replica of the learner: modules and clock of its own, the same parameters, copies of buffers.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, TypeVar

from metawrap.execution.threads import replica

Method = TypeVar("Method", bound=Callable[..., Any])


class Calls:
    """The calls of one learner that run at present."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._alone: int | None = None  # The thread that uses the learner's own modules.
        self._sharing = 0  # Calls on replicas.
        self._waiting = 0  # Calls that wait to be alone: new calls on replicas let them pass.
        self._met = False
        self._held = threading.local()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """For a call that learns: waits for all other threads' calls, and they wait for it."""
        if self._alone == threading.get_ident():
            yield
            return
        own = 1 if self._replica_here() is not None else 0
        with self._changed:
            self._waiting += 1
            self._changed.wait_for(lambda: self._alone is None and self._sharing <= own)
            self._waiting -= 1
            self._alone = threading.get_ident()
        try:
            yield
        finally:
            self._leave()

    @contextmanager
    def shared(self, learner: Any) -> Iterator[Any]:
        """For a call that does not learn: yields the learner to run it on, the given one or a replica of it."""
        here = self._replica_here()
        if here is not None or self._alone == threading.get_ident():
            yield learner if here is None else here
            return
        with self._changed:
            self._met = self._met or self._alone is not None or self._sharing > 0
            self._changed.wait_for(lambda: self._alone is None and not self._waiting)
            # The first task of a mode is inspected on the learner itself, which keeps the findings.
            made = self._replica_of(learner) if self._met and False in learner.findings else None
            if made is None:
                self._changed.wait_for(lambda: self._alone is None and not self._sharing)
                self._alone = threading.get_ident()
            else:
                self._sharing += 1
        if made is None:
            try:
                yield learner
            finally:
                self._leave()
            return
        self._held.replica = made
        try:
            yield made
        finally:
            self._held.replica = None
            with self._changed:
                self._sharing -= 1
                self._changed.notify_all()

    def _replica_here(self) -> Any:
        return getattr(self._held, "replica", None)

    def _leave(self) -> None:
        with self._changed:
            self._alone = None
            self._changed.notify_all()

    def _replica_of(self, learner: Any) -> Any:
        """A replica with buffers of its own; None where the model cannot be replicated, so that calls take turns."""
        if any(getattr(module, "max_norm", None) is not None for module in learner.model.modules()):
            return None  # Its forward edits weights that all replicas share.
        try:
            return replica(learner, shared=[learner.outer, learner.executor, self], buffers=False)
        except Exception:  # Whatever a model of the user's own raises when it is copied.
            return None

    def __deepcopy__(self, memo: dict[int, Any]) -> Calls:
        return Calls()

    def __reduce__(self) -> Any:
        return Calls, ()


def shared(method: Method) -> Method:
    """Makes a method of a learner run as a call that does not learn."""

    @wraps(method)
    def run(self: Any, *args: Any, **keywords: Any) -> Any:
        with self.calls.shared(self) as learner:
            return method(learner, *args, **keywords)

    return run  # type: ignore[return-value]


def alone(method: Method) -> Method:
    """Makes a method of a learner run as a call that learns."""

    @wraps(method)
    def run(self: Any, *args: Any, **keywords: Any) -> Any:
        with self.calls.alone():
            return method(self, *args, **keywords)

    return run  # type: ignore[return-value]
