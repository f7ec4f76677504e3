"""Which calls of a learner may run at the same time, from any thread, and on which modules.

A call that learns is alone. Calls that do not learn share: together they run on replicas of the learner, by itself one
runs on the learner's own modules. Short looks at these modules wait until no call runs on them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, TypeVar

from metawrap.errors import MetaWrapError
from metawrap.execution.executor import edits_weights
from metawrap.execution.threads import replica

Method = TypeVar("Method", bound=Callable[..., Any])


class _Here(threading.local):
    """What one thread has: how many calls that share are around it, and their replica of the learner."""

    depth = 0
    replica: Any = None


class Calls:
    """The calls of one learner that run at present.

    A call that does not learn (`adapt`, `evaluate`, `forward` in eval mode) lends fast weights to the modules, moves
    the inner-step clock and sets training flags. From one thread it uses the learner's own modules. Once the calls of
    several threads have met, each call has a replica of the learner: modules and a clock of its own, the same
    parameters, and copies of the buffers.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._learning: int | None = None  # The thread of the call that learns.
        self._using: int | None = None  # The thread whose call, which does not learn, uses the learner's own modules.
        self._sharing = 0  # Threads in calls that do not learn.
        self._waiting = 0  # Calls that wait to learn: new calls let them pass.
        self._met = False
        self._here = _Here()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """For a call that learns: waits for all other threads' calls, and they wait for it."""
        me = threading.get_ident()
        if self._learning == me:
            yield
            return
        own = 1 if self._here.depth else 0
        with self._changed:
            if own and (self._sharing > own or self._here.replica is not None):
                raise MetaWrapError(
                    "A call that learns (meta_step, forward in training mode, load_state_dict) began inside of a call "
                    "that does not, in a metric of evaluate for example, while other threads use the learner: both "
                    "would wait for ever. Make it after that call."
                )
            self._waiting += 1
            try:
                self._changed.wait_for(lambda: self._learning is None and self._sharing == own)
                self._learning = me
            finally:
                self._waiting -= 1
                self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._learning = None
                self._changed.notify_all()

    @contextmanager
    def shared(self) -> Iterator[None]:
        """For a call that does not learn: no call learns until it ends. `modules` then says what it runs on."""
        here, entered = self._here, False
        if here.depth or self._learning == threading.get_ident():
            yield
            return
        try:
            with self._changed:
                self._changed.wait_for(lambda: self._learning is None and not self._waiting)
                self._sharing += 1
                here.depth, entered = 1, True
            yield
        finally:
            if entered:
                with self._changed:
                    self._sharing -= 1
                    self._met = self._sharing > 0
                    here.depth, here.replica = 0, None
                    self._changed.notify_all()

    @contextmanager
    def modules(self, learner: Any) -> Iterator[Any]:
        """Inside of `shared`: yields the learner to run on for a while, the given one or a replica of it."""
        here, me = self._here, threading.get_ident()
        if here.replica is not None or me in (self._learning, self._using):
            yield learner if here.replica is None else here.replica
            return
        with self._changed:
            self._met = self._met or self._sharing > 1
            self._changed.wait_for(lambda: self._using is None)
            # The first task of a mode is inspected on the learner itself, which keeps the findings.
            if self._met and False in learner.findings:
                here.replica = self._replica_of(learner)
            if here.replica is None:
                self._using = me
        try:
            yield learner if here.replica is None else here.replica
        finally:
            if self._using == me:
                with self._changed:
                    self._using = None
                    self._changed.notify_all()

    @contextmanager
    def at_rest(self, learner: Any) -> Iterator[None]:
        """For a short look at the learner's own modules, or a change that replicas need not see: no call uses them."""
        if learner is self._here.replica:
            yield
            return
        with self._changed:
            self._changed.wait_for(lambda: {self._learning, self._using} <= {None, threading.get_ident()})
            yield

    def _replica_of(self, learner: Any) -> Any:
        """A replica with buffers of its own; None where the model cannot be replicated, so that calls take turns."""
        if edits_weights(learner.model):
            return None  # All replicas share the weights.
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
        with self.calls.shared(), self.calls.modules(self) as learner:
            return method(learner, *args, **keywords)

    return run  # type: ignore[return-value]


def sharing(method: Method) -> Method:
    """As `shared`, but the method takes `modules` itself, for a part of its work at a time."""

    @wraps(method)
    def run(self: Any, *args: Any, **keywords: Any) -> Any:
        with self.calls.shared():
            return method(self, *args, **keywords)

    return run  # type: ignore[return-value]


def alone(method: Method) -> Method:
    """Makes a method of a learner run as a call that learns."""

    @wraps(method)
    def run(self: Any, *args: Any, **keywords: Any) -> Any:
        with self.calls.alone():
            return method(self, *args, **keywords)

    return run  # type: ignore[return-value]


def at_rest(method: Method) -> Method:
    """Makes a method of a learner a short look at its own modules, while no call of another thread uses them.

    What it would generate is listed before.
    """

    @wraps(method)
    def run(self: Any, *args: Any, **keywords: Any) -> Any:
        with self.calls.at_rest(self):
            found = method(self, *args, **keywords)
            return iter(list(found)) if isinstance(found, Iterator) else found

    return run  # type: ignore[return-value]
