"""Batch norm with its own scale, shift and statistics per inner step, as a subclass of the user's own norm class.

The user's forward runs unchanged. During a call its parameters and statistics are this step's rows, ordinary
(channels,) tensors. So a norm that also runs an activation, or other code, keeps doing so.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from metawrap.errors import UnsupportedModuleError
from metawrap.layers.moments import (
    SHIFTS,
    batch_norm,
    centre_and_scale,
    check_size,
    fold_shifts,
    moments_of,
    over_channels,
    own_form_pays,
    scale_beside,
    scaled,
    shift_of,
    shifted,
    unbiased,
    wide_of,
)
from metawrap.layers.norm_of_pooled import normalised, pooled_with_moments
from metawrap.layers.quick_forms import Window, max_pool2d
from metawrap.layers.step_clock import Moments, StepClock
from metawrap.layers.task_norm import Blend, blended, neutral_statistics, share_of


@dataclass
class PerStepState:
    """The attributes of a per-step norm, under one name that cannot collide with the user's own.

    affine, statistics: whether weight and bias, and the running statistics, have a row per step.
    blend: the moments of an example that TaskNorm blends in.
    """

    clock: StepClock
    name: str
    steps: int
    affine: bool
    statistics: bool
    blend: Blend = "instance"

    def row(self) -> int:
        """The row of the current inner step."""
        return min(self.clock.step, self.steps - 1)


class PerStepNorm(_BatchNorm):
    """Mixed in front of a batch-norm class by `make_per_step`; never built directly.

    weight, bias: (steps, channels), or (channels,) when not per step. running_mean, running_var: likewise.
    num_batches_tracked: (steps,), or () when not per step. Rows past the last are the last.
    """

    per_step: PerStepState

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The user's own forward on this step's rows; input and output as the user's class has them."""
        clock = self.per_step.clock
        use = clock.statistics or ("batch" if self.training else "running")
        tracks = self._buffers.get("running_mean") is not None
        if use == "capture":
            clock.captured.setdefault(self.per_step.name, []).append(moments_of(input, clock.rows))
        elif use in ("captured", "shifted"):
            context = self._context()
            if use == "shifted":
                self._record_shift(input, *context)
                context = self.shifted(*context)
            mean, variance = context
            return self._forward_scaled(input, *centre_and_scale(input, mean, variance, self.eps), *args, **kwargs)
        elif use.startswith("blended"):
            own = use != "blended_captured"
            context = (*self._seen(input), share_of(self, input, clock.rows)) if own else self._context()
            if use == "blended_capture":
                clock.captured.setdefault(self.per_step.name, []).append(context)
            mean, variance, share = context
            found = blended(input, mean, variance, share, self.per_step.blend, self.eps)
            return self._forward_scaled(input, *found, *args, **kwargs)
        # Without stored statistics the batch's own are used in evaluation too, as in torch's norms.
        if use == "running" and tracks:
            with self._lent(self._stored_statistics(), training=False):
                return super().forward(input, *args, **kwargs)
        if clock.rows is not None:
            return self._forward_scaled(input, *centre_and_scale(input, *self._seen(input), self.eps), *args, **kwargs)
        check_size(self.per_step.name, input)
        if self._is_torchs(input):
            return self._torchs_forward(input)
        seen: dict[str, Any] = self._empty_statistics(input) if tracks else {}
        # With a momentum of 1 on empty statistics, any forward leaves this batch's moments in them.
        with self._lent(seen, training=True, momentum=1.0):
            output = super().forward(input, *args, **kwargs)
            # Read from the slots: the user's forward may have replaced the statistics rather than edited them.
            seen = {name: self._buffers[name] for name in seen}
        if tracks:
            self._record(seen["running_mean"].detach(), seen["running_var"].detach())
        return output

    def of_pooled(self, input: Tensor, window: Window) -> Tensor | None:
        """Normalises the max-pooled input by the statistics of the whole input; None where `forward` has to run."""
        clock, mean = self.per_step.clock, self._buffers.get("running_mean")
        use = clock.statistics or ("batch" if self.training else "running")
        plain = {"weight", "bias"} <= self._parameters.keys() and self._is_torchs(input)  # Without parametrizations.
        if not plain or clock.rows is not None or use not in ("batch", "capture", "captured"):
            return None
        weight, bias = self._affine()
        alike = all(t is None or t.dtype == input.dtype for t in (weight, bias, mean))
        if not alike or any(t is not None and t.shape != (self.num_features,) for t in (weight, bias)):
            return None
        if weight is not None and not bool((weight > 0).all()):  # The largest number would not stay the largest.
            return None
        if use == "captured":
            (mean, variance), pooled = self._context(), max_pool2d(input, *window)
        else:
            check_size(self.per_step.name, input)
            self._check_input_dim(input)  # type: ignore[no-untyped-call]
            mean, variance, pooled = pooled_with_moments(input, window)
            if use == "capture":
                clock.captured.setdefault(self.per_step.name, []).append((mean, variance))
            if self._buffers.get("running_mean") is not None:
                self._record(*unbiased(input, mean, variance))
        return normalised(pooled, mean, variance, weight, bias, self.eps)

    @torch.no_grad()
    def fold(self, passes: Sequence[Moments], keep: Tensor) -> None:
        """Folds each pass into its row with the norm's momentum, in order; not where `keep`, a bool scalar, is false.

        n folds at once: r <- (1 - m)^n r + sum of m (1 - m)^(n - 1 - j) x_j, at the cost of one.
        """
        mean, variance, count = (self._buffers[name] for name in ("running_mean", "running_var", "num_batches_tracked"))
        assert mean is not None
        assert variance is not None
        rows: dict[int, list[Moments]] = {}
        for moments in passes:
            rows.setdefault(moments.row if self.per_step.statistics else 0, []).append(moments)
        # Rows that follow each other, and were seen in the same number of passes, are folded by one operation.
        neighbours = groupby(enumerate(sorted(rows)), key=lambda place: (place[1] - place[0], len(rows[place[1]])))
        for (_, folds), run in neighbours:
            places = [row for _, row in run]
            at = slice(places[0], places[-1] + 1) if self.per_step.statistics else None
            seen = [moments for row in places for moments in rows[row]]
            left, shares = self._shares(folds, mean, None if count is None else count[at])
            for stored, values in ((mean, [m.mean for m in seen]), (variance, [m.variance for m in seen])):
                of_rows = torch.stack(values).to(stored.dtype).view(len(places), folds, stored.shape[-1])
                folded = left * stored[at] + (shares * of_rows).sum(1)
                stored[at] = torch.where(keep, folded, stored[at])
            if count is not None:
                count[at] += keep * folds

    def _shares(self, folds: int, like: Tensor, count: Tensor | None) -> tuple[Tensor, Tensor]:
        """The shares after so many folds: of the stored value, (rows or 1, 1), and of each fold, (rows or 1, folds, 1).

        Args: count: (rows,), the folds before.
        """
        if self.momentum is None:
            # A cumulative average. In the statistics' own precision: a quotient of whole numbers would be float32.
            assert count is not None
            number = (count + folds).to(like.dtype).unsqueeze(-1)
            return count.unsqueeze(-1) / number, (1 / number).unsqueeze(-1).expand(-1, folds, 1)
        left = (1 - self.momentum) ** torch.arange(folds, -1, -1, dtype=like.dtype, device=like.device).view(1, -1, 1)
        return left[:, 0], self.momentum * left[:, 1:]

    def extra_repr(self) -> str:
        """The user's own line, with the number of steps."""
        line: str = super().extra_repr()  # type: ignore[no-untyped-call]
        return f"{line}, steps={self.per_step.steps}"

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made at run time, so pickle must be told how to make it again.
        parts: Any = super().__reduce_ex__(protocol)
        return (_new_per_step, (type(self).original_class,), *parts[2:])  # type: ignore[attr-defined]

    def _is_torchs(self, input: Tensor) -> bool:
        """Whether forward is torch's own, with a number of channels that it would not refuse."""
        own = type(self).original_class.forward is _BatchNorm.forward  # type: ignore[attr-defined]
        return own and input.ndim > 1 and input.shape[1] == self.num_features

    def _torchs_forward(self, input: Tensor) -> Tensor:
        """The forward of torch's own batch norm on this step's rows."""
        self._check_input_dim(input)  # type: ignore[no-untyped-call]
        weight, bias = self._affine()
        weight = scale_beside(bias, weight)
        mean: Any = None
        variance: Any = None
        if (stored := self._buffers.get("running_mean")) is not None:
            mean, variance = (input.new_zeros(self.num_features, dtype=stored.dtype) for _ in range(2))
        if own_form_pays(input, weight, bias, mean):
            output = batch_norm(input, weight, bias, mean, variance, self.eps)
        else:
            enabled = torch.backends.cudnn.enabled
            output = torch.batch_norm(input, weight, bias, mean, variance, True, 1.0, self.eps, enabled)
        if mean is not None:
            self._record(mean, variance)
        return output

    def _affine(self) -> tuple[Any, Any]:
        """This step's weight and bias, (channels,) each; None where the norm has none."""
        return self._of_step("weight"), self._of_step("bias")

    def _of_step(self, name: str) -> Any:
        value = self._parameters.get(name)
        if value is None:
            return getattr(self, name)  # None, or computed by a parametrization, without rows.
        return value[self.per_step.row()] if self.per_step.affine else value

    def _seen(self, input: Tensor) -> tuple[Tensor, Tensor]:
        """The moments of the batch, which are recorded."""
        check_size(self.per_step.name, input)
        mean, variance = moments_of(input, self.per_step.clock.rows)
        if self._buffers.get("running_mean") is not None:
            self._record(*unbiased(input, mean, variance, self.per_step.clock.rows))
        return mean, variance

    def _record(self, mean: Tensor, variance: Tensor) -> None:
        state = self.per_step
        if state.clock.recorder is not None:
            state.clock.recorder.append(Moments(state.name, state.row(), mean, variance))

    @contextmanager
    def _lent(self, buffers: dict[str, Tensor], **attributes: Any) -> Iterator[None]:
        parameters = {}
        if self.per_step.affine:
            row = self.per_step.row()
            parameters = {name: p[row] for name in ("weight", "bias") if (p := self._parameters.get(name)) is not None}
        lent: list[tuple[Any, dict[str, Any]]] = [(self._parameters, parameters), (self._buffers, buffers)]
        before = [(table, {name: table[name] for name in values}) for table, values in lent]
        before.append((self.__dict__, {name: getattr(self, name) for name in attributes}))
        try:
            for table, values in [*lent, (self.__dict__, attributes)]:
                table.update(values)
            yield
        finally:
            for table, values in before:
                table.update(values)

    def _stored_statistics(self) -> dict[str, Tensor]:
        row = self.per_step.row() if self.per_step.statistics else ...
        names = ("running_mean", "running_var", "num_batches_tracked")
        # Contiguous clones: a backward pass may still need them after the next fold.
        return {name: b[row].clone() for name in names if (b := self._buffers.get(name)) is not None}

    def _empty_statistics(self, input: Tensor) -> dict[str, Tensor]:
        mean, count = self._buffers["running_mean"], self._buffers.get("num_batches_tracked")
        assert mean is not None
        # Of the input's kind: under vmap there is one set for each task.
        names = ("running_mean", "running_var")
        empty = {name: input.new_zeros(self.num_features, dtype=mean.dtype) for name in names}
        if count is not None:
            empty["num_batches_tracked"] = count.new_zeros(())
        return empty

    def _forward_scaled(self, input: Tensor, centre: Tensor, scale: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The user's forward on `(input - centre) * scale`, which has its mean and variance already."""
        wide = wide_of(input)
        if self._is_torchs(input):
            self._check_input_dim(input)  # type: ignore[no-untyped-call]
            weight, bias = (None if value is None else value.view(over_channels(input)) for value in self._affine())
            return scaled(wide, centre, scale if weight is None else scale * weight, bias).to(input.dtype)
        normalised = scaled(wide, centre, scale, None).to(input.dtype)
        with self._lent(neutral_statistics(self, normalised), training=False):
            return super().forward(normalised, *args, **kwargs)

    def _context(self) -> tuple[Tensor, ...]:
        """The moments that the context pass kept for this call of the norm."""
        waiting = self.per_step.clock.captured.get(self.per_step.name)
        if not waiting:
            raise UnsupportedModuleError(
                f"'{self.per_step.name}' ({type(self).__name__}) ran more often on the target than on the support "
                'set, so the support set has no statistics for it. Use norm="batch".'
            )
        return waiting.pop(0)

    def shifted(self, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
        """What normalises a target pass under "running": its support set's moments, (channels,), moved by the row."""
        shift, ratio = (self._buffers.get(name) for name in SHIFTS[:2])
        if shift is None or ratio is None:
            return mean, variance
        row = self.per_step.row() if self.per_step.statistics else ...
        return shifted(mean, variance, shift[row], ratio[row], self.eps)

    def _record_shift(self, input: Tensor, mean: Tensor, variance: Tensor) -> None:
        state = self.per_step
        if state.clock.recorder is not None and self._buffers.get(SHIFTS[0]) is not None:
            shift, ratio = shift_of(input, mean, variance, self.eps, state.clock.rows)
            state.clock.recorder.append(Moments(state.name, state.row(), shift, ratio, shift=True))

    def fold_shifts(self, passes: Sequence[Moments], keep: Tensor) -> None:
        """Folds the shifts that the target passes of one meta-step had into their rows; see `fold_shifts`."""
        for row in dict.fromkeys(moments.row for moments in passes) if self.per_step.statistics else [...]:
            seen = [(m.mean, m.variance) for m in passes if row in (m.row, ...)]
            fold_shifts([self._buffers[name] for name in SHIFTS], row, seen, self.momentum, keep)


def fold_moments(model: nn.Module, outcomes: Iterable[Any], keep: Tensor) -> None:
    """Folds what the norms of a model saw in each task's passes; unchanged where `keep`, a bool scalar, is false.

    Args:
        outcomes: in task order; each has `moments`, a list of `Moments` in the order of passes.
    """
    passes: dict[tuple[str, bool], list[Moments]] = {}
    for outcome in outcomes:
        for moments in outcome.moments:
            passes.setdefault((moments.norm, moments.shift), []).append(moments)
    norms = {m.per_step.name: m for m in model.modules() if isinstance(m, PerStepNorm)}
    for (name, shift), seen in passes.items():
        (norms[name].fold_shifts if shift else norms[name].fold)(seen, keep)


class _LocalForward(_BatchNorm):
    """Stands before SyncBatchNorm: the statistics of a task live in one process, so there is nothing to synchronise."""

    def forward(self, input: Tensor) -> Tensor:
        """Ordinary batch norm; (batch, channels, ...) in and out."""
        return _BatchNorm.forward(self, input)


def per_step_class(original: type[_BatchNorm]) -> type[PerStepNorm]:
    """The per-step subclass of a batch-norm class, one for each."""
    return _made_class(original)  # type: ignore[arg-type]


@cache
def _made_class(original: type[_BatchNorm]) -> type[PerStepNorm]:
    bases: tuple[type, ...] = (PerStepNorm, original)
    if issubclass(original, nn.SyncBatchNorm):
        bases = (PerStepNorm, _LocalForward, original)
    return type(f"PerStep{original.__name__}", bases, {"original_class": original, "__module__": __name__})


def _new_per_step(original: type[_BatchNorm]) -> PerStepNorm:
    made = per_step_class(original)
    return made.__new__(made)
