"""A slow, plain MAML++ in float64, written from the formulas. It shares no code with metawrap and never imports it.

Two independent forms: `meta_gradient` for any nn.Module (fast tensors are put into the module's own slots, batch norm
is written out by hand), and `conv4_meta_gradient`, one flat loop over explicit weights that checks the first.
"""

from __future__ import annotations

import contextlib
import copy
import math
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm

Moments = tuple[Tensor, Tensor, Tensor]
# By their formulas: torch's own have no second derivative.
PLAIN_GATES: dict[type[nn.Module], Callable[[Tensor], Tensor]] = {
    nn.Hardsigmoid: lambda x: torch.clamp(x / 6 + 0.5, 0, 1),
    nn.Hardswish: lambda x: x * torch.clamp(x / 6 + 0.5, 0, 1),
}


def plain_weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """By its formula: the second derivative of `torch._weight_norm` is wrong."""
    axes = [axis for axis in range(v.dim()) if dim == -1 or axis != dim % v.dim()]
    return g * v / v.square().sum(axes, keepdim=True).sqrt()


@contextlib.contextmanager
def plain_operations() -> Iterator[None]:
    """Attention and weight norm of operations that torch differentiates twice, and rightly."""
    with (
        sdpa_kernel(SDPBackend.MATH),
        mock.patch("torch._weight_norm", plain_weight_norm),
        mock.patch.object(sys.modules["torch.nn.utils.weight_norm"], "_weight_norm", plain_weight_norm),
    ):
        yield


@dataclass
class Reference:
    """What one pass over a task batch must give.

    step_losses hold None where no target pass is due, predictions where the prediction is not a tensor. `statistics`
    are the rows after the pass, `buffers` the model's other buffers and its frozen parameters.
    """

    loss: Tensor
    gradients: dict[str, Tensor | None]
    statistics: dict[str, Tensor]
    step_losses: list[list[Tensor | None]] = field(default_factory=list)
    predictions: list[Tensor | None] = field(default_factory=list)
    fast_weights: list[dict[str, Tensor]] = field(default_factory=list)
    buffers: dict[str, Tensor] = field(default_factory=dict)


def msl_weights(steps: int, epoch: int, anneal_epochs: int) -> list[float]:
    """MSL as it happens, in exact fractions: each epoch every early step hands a share to the last, down to a floor."""
    share, floor = Fraction(1, steps * max(anneal_epochs, 1)), Fraction(3, 100 * steps)
    early = Fraction(1, steps) if anneal_epochs > epoch else Fraction(0)
    for _ in range(epoch if early else 0):
        early = max(early - share, floor)
    return [float(early)] * (steps - 1) + [float(1 - (steps - 1) * early)]


def norms_of(model: nn.Module) -> dict[str, _BatchNorm]:
    return {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}


def meta_gradient(
    model: nn.Module,
    tasks: Iterable[tuple[Any, Any, Any, Any]],
    *,
    rates: Mapping[str, Tensor],
    step_weights: list[float],
    values: Mapping[str, Tensor] | None = None,
    statistics: Mapping[str, Tensor] | None = None,
    second_order: bool = True,
    norm: str = "batch",
    training: bool = True,
    loss_fn: Callable[[Any, Any], Tensor] = F.cross_entropy,
    after_norm: Mapping[type, Callable[[Tensor], Tensor]] | None = None,
    kept: Collection[str] = (),
    in_place: bool = False,
    loss_alone: bool = False,
) -> Reference:
    """Loss, meta-gradients (`grad` of every value, and of `lr/<name>` for every rate) and statistics of a task batch.

    Args:
        model: the user's plain model; read, never changed.
        tasks: (support_x, support_y, target_x, target_y) for each task, without a task axis.
        rates: (steps,) for each adapted parameter; the parameters without one are not adapted.
        step_weights: weight of the target loss after each step; its length is the number of steps. Where a weight is 0
            no target pass is made.
        values: initial values, by the user's names; a norm's may have a leading row axis. Default: the model's.
        statistics: `<norm>.running_mean` and `.running_var` with a leading row axis. Default: the model's, one row.
        norm: the policy; under "task" and "task_layer" `values` has each norm's blend_scale and blend_offset.
        training: only training
            folds statistics: those of every pass that normalises by its own, so under "support" those of the second
            support pass stand where the target's would.
        after_norm: what a norm of this exact class does after normalising.
        kept: norms that stay torch's own, on their stored statistics.
        in_place: works on the model itself, for models that copy.deepcopy does not copy whole, such as closures.
        loss_alone: leaves the meta-gradients out.
    """
    second_order = second_order and not loss_alone
    model = (model if in_place else copy.deepcopy(model)).train(training)
    own = dict(model.named_parameters())
    start = {name: (values or own)[name].detach().clone() for name in own}
    for name, parameter in own.items():
        start[name].requires_grad_(parameter.requires_grad)
        for hook in (parameter._backward_hooks or {}).values():
            start[name].register_hook(hook)
    # What TaskNorm learns besides the user's parameters.
    blends = {name: value for name, value in (values or {}).items() if ".blend_" in name}
    start |= {name: value.detach().clone().requires_grad_() for name, value in blends.items()}
    start_rates = {name: rate.detach().clone().requires_grad_() for name, rate in rates.items()}
    machine = _Machine(model, statistics, after_norm or {}, kept)
    result = Reference(torch.zeros(()), {}, machine.statistics)
    losses = []
    leaves = {name: value for name, value in start.items() if value.requires_grad}
    leaves |= {f"lr/{name}": rate for name, rate in start_rates.items()}
    whole: list[Tensor | None] = [None] * len(leaves)
    tasks = list(tasks)
    with plain_operations():
        for support_x, support_y, target_x, target_y in tasks:
            # What is not adapted is the model's own, and what forward does to it in place stays.
            fast = {name: value.clone() if name in start_rates else value for name, value in start.items()}
            total: Any = 0.0
            per_step: list[Tensor | None] = []
            for step, weight in enumerate(step_weights):
                prediction, moments = machine.run(fast, step, support_x, norm)
                if training:
                    machine.fold(step, moments)
                support_loss = loss_fn(prediction, support_y)
                names = [name for name in start_rates if fast[name].requires_grad]
                gradients = torch.autograd.grad(
                    support_loss, [fast[name] for name in names], create_graph=second_order, allow_unused=True
                )
                fast = dict(fast)
                for name, gradient in zip(names, gradients, strict=True):
                    if gradient is not None:
                        gradient = gradient if second_order else gradient.detach()
                        rate = start_rates[name]
                        fast[name] = fast[name] - rate[min(step, len(rate) - 1)] * gradient
                        if loss_alone:
                            fast[name] = fast[name].detach().requires_grad_()
                per_step.append(None)
                if weight == 0.0:
                    continue
                if norm == "batch":
                    prediction, moments = machine.run(fast, step, target_x, norm)
                else:
                    _, moments = machine.run(fast, step, support_x, norm)
                    prediction, _ = machine.run(fast, step, target_x, norm, moments)
                if training:
                    machine.fold(step, moments)
                target_loss = loss_fn(prediction, target_y)
                target_loss = target_loss.detach() if loss_alone else target_loss
                per_step[-1] = target_loss.detach()
                total = total + weight * target_loss
            if not loss_alone:
                # Task by task: the graphs of all tasks of a large network do not fit into memory at once.
                # A task may have left a graph in the model for the next one, so it is freed with its last holder.
                own_gradients = torch.autograd.grad(
                    total / len(tasks), list(leaves.values()), allow_unused=True, retain_graph=True
                )
                found = [g.to_dense() if g is not None and g.is_sparse else g for g in own_gradients]
                whole = [b if a is None else a if b is None else a + b for a, b in zip(whole, found, strict=True)]
            losses.append(total.detach())
            result.step_losses.append(per_step)
            result.predictions.append(prediction.detach() if isinstance(prediction, Tensor) else None)
            result.fast_weights.append({name: value.detach() for name, value in fast.items()})
    if training:
        machine.fold_shifts()
    result.loss = torch.stack(losses).mean()
    result.gradients = {} if loss_alone else dict(zip(leaves, whole, strict=True))
    normed = {f"{name}.{local}" for name, norm in norms_of(model).items() for local in norm._buffers}
    result.buffers = {name: b.detach().clone() for name, b in model.named_buffers() if name not in normed}
    result.buffers |= {name: value for name, value in start.items() if not value.requires_grad}
    return result


class _Machine:
    """Runs a copy of the model with given weights and hand-written batch norms."""

    def __init__(
        self,
        model: nn.Module,
        statistics: Mapping[str, Tensor] | None,
        after_norm: Mapping[type, Callable[[Tensor], Tensor]],
        kept: Collection[str],
    ) -> None:
        self.model = model
        self.norms = {name: norm for name, norm in norms_of(model).items() if name not in kept}
        self.names = {id(parameter): name for name, parameter in model.named_parameters()}
        self.slots = [
            (module, local, self.names[id(parameter)])
            for module in model.modules()
            for local, parameter in module._parameters.items()
            if parameter is not None
        ]
        self.statistics: dict[str, Tensor] = {}
        self.row, self.norm, self.seen, self.context, self.weights, self.examples = 0, "batch", {}, None, {}, 0
        self.shifts: dict[tuple[str, int], list[tuple[Tensor, Tensor]]] = {}
        self.folds: dict[tuple[str, int], int] = {}  # of each row so far
        for name, norm in norms_of(model).items():
            for kind in ("target_shift", "target_log_ratio"):
                if statistics is not None and (key := f"{name}.{kind}") in statistics:
                    self.statistics[key] = statistics[key].detach().clone()
            for kind in ("running_mean", "running_var"):
                own = getattr(norm, kind)
                if own is not None:
                    given = own[None] if statistics is None else statistics[f"{name}.{kind}"]
                    self.statistics[f"{name}.{kind}"] = given.detach().clone()
                    if name in kept:
                        own.copy_(given[0])
            if name in kept:
                norm.eval()
                continue
            norm.forward = self._norm_forward(name, norm, after_norm.get(type(norm)))  # type: ignore[method-assign]
        for module in model.modules():
            if type(module) in PLAIN_GATES:
                module.forward = PLAIN_GATES[type(module)]  # type: ignore[method-assign]

    def run(
        self, weights: Mapping[str, Tensor], row: int, x: Any, norm: str, context: Any = None
    ) -> tuple[Any, dict[str, list[Moments]]]:
        """Output and, for each norm, the batch moments of its calls: mean, biased and unbiased variance.

        Args:
            context: those of the support set, for a target pass.
        """
        self.row, self.norm, self.seen, self.context, self.weights = row, norm, {}, context, weights
        fresh = {id(b): b.clone() for b in self.model.buffers()}  # Earlier passes keep the values that they saw.
        for module in self.model.modules():
            module._buffers.update((n, fresh[id(b)]) for n, b in module._buffers.items() if b is not None)
        with self._lent(weights):
            if isinstance(x, dict):
                output = self.model(**x)
            else:
                output = self.model(*x) if isinstance(x, tuple) else self.model(x)
        return output, self.seen

    def fold(self, row: int, moments: Mapping[str, list[Moments]]) -> None:
        for name, calls in moments.items():
            for mean, _, unbiased in calls:
                for kind, new in (("running_mean", mean), ("running_var", unbiased)):
                    if (key := f"{name}.{kind}") in self.statistics:
                        old = self.statistics[key]
                        at, momentum = min(row, len(old) - 1), self.norms[name].momentum
                        folded = self.folds[key, at] = self.folds.get((key, at), 0) + 1
                        if momentum is None:  # A cumulative average: each of n batches weighs 1 / n.
                            momentum = 1 / (int(self.norms[name].num_batches_tracked) + folded)  # type: ignore[arg-type]
                        old[at] = (1 - momentum) * old[at] + momentum * new.detach()

    def fold_shifts(self) -> None:
        """The first fold of each row: the mean over all tasks."""
        for (name, row), seen in self.shifts.items():
            for kind, values in zip(("target_shift", "target_log_ratio"), zip(*seen, strict=True), strict=True):
                self.statistics[f"{name}.{kind}"][row] = sum(values) / len(values)  # type: ignore[arg-type]

    @contextlib.contextmanager
    def _lent(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        kept = [module._parameters[local] for module, local, _ in self.slots]
        for module, local, name in self.slots:
            weights[name]._is_param = True  # type: ignore[attr-defined]  # isinstance(_, nn.Parameter) holds
            module._parameters[local] = weights[name]  # type: ignore[assignment]
        for module in self.model.modules():
            if isinstance(module, nn.RNNBase):
                module._flat_weights = [module._parameters[local] for local in module._flat_weights_names]
        yield
        for (module, local, _), parameter in zip(self.slots, kept, strict=True):
            module._parameters[local] = parameter

    def _norm_forward(
        self, name: str, norm: _BatchNorm, after: Callable[[Tensor], Tensor] | None
    ) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            axes = [0, *range(2, x.dim())]
            view = [1, -1] + [1] * (x.dim() - 2)
            mean = x.mean(axes)
            var = ((x - mean.view(view)) ** 2).mean(axes)
            count = math.prod(x.shape[axis] for axis in axes)
            calls = self.seen.setdefault(name, [])
            calls.append((mean, var, var * count / max(count - 1, 1)))
            examples = len(x)
            if self.context is not None:
                own, (mean, var, _) = (mean.detach(), var.detach()), self.context[name][len(calls) - 1]
                if f"{name}.target_shift" in self.statistics:
                    deviation = torch.sqrt(var + norm.eps)
                    ratio = torch.log(torch.sqrt(own[1] + norm.eps) / deviation.detach())
                    row = min(self.row, len(self.statistics[f"{name}.target_shift"]) - 1)
                    rows = self.shifts.setdefault((name, row), [])
                    rows.append(((own[0] - mean.detach()) / deviation.detach(), ratio))
                    shift, log = (
                        self._pick(self.statistics[f"{name}.target_{k}"]).clone() for k in ("shift", "log_ratio")
                    )
                    mean, var = mean + shift * deviation, (deviation * torch.exp(log)) ** 2 - norm.eps
                examples = self.examples
            self.examples = examples
            mean, var = mean.view(view), var.view(view)
            if f"{name}.blend_scale" in self.weights and self.norm.startswith("task"):
                each = list(range(1 if self.norm == "task_layer" else 2, x.dim()))
                a = 1 / (
                    1
                    + torch.exp(-self.weights[f"{name}.blend_scale"] * examples - self.weights[f"{name}.blend_offset"])
                )
                mean_of = x.mean(each, keepdim=True) if each else x
                var_of = ((x - mean_of) ** 2).mean(each, keepdim=True) if each else torch.zeros_like(x)
                both = a * mean + (1 - a) * mean_of
                # The second moment about the blended mean.
                var = a * (var + mean**2) + (1 - a) * (var_of + mean_of**2) - 2 * both * both + both**2
                mean = both
            out = (x - mean) / torch.sqrt(var + norm.eps)
            if norm.affine:
                weight, bias = (self._pick(norm._parameters[kind], 2) for kind in ("weight", "bias"))
                out = out * weight.view(view) + bias.view(view)
            return out if after is None else after(out)

        return forward

    def _pick(self, rows: Any, axes_when_rows: int = 2) -> Tensor:
        return rows[min(self.row, len(rows) - 1)] if rows.dim() == axes_when_rows else rows


def conv4_meta_gradient(
    tasks: Iterable[tuple[Tensor, Tensor, Tensor, Tensor]],
    values: Mapping[str, Tensor],
    rates: Mapping[str, Tensor],
    statistics: Mapping[str, Tensor],
    step_weights: list[float],
) -> Reference:
    """The same for the pooled Conv4 under norm="batch", second order, with nothing but tensors: no module at all."""
    weights = {name: value.detach().clone().requires_grad_() for name, value in values.items()}
    speeds = {name: rate.detach().clone().requires_grad_() for name, rate in rates.items()}
    rows = {name: value.detach().clone() for name, value in statistics.items()}

    def network(x: Tensor, fast: Mapping[str, Tensor], step: int) -> Tensor:
        for block in range(4):
            x = F.conv2d(x, fast[f"conv{block}.conv.weight"], fast[f"conv{block}.conv.bias"], padding=1)
            n, c, h, w = x.shape
            mean = x.sum((0, 2, 3)) / (n * h * w)
            centred = x - mean.reshape(1, c, 1, 1)
            square = (centred * centred).sum((0, 2, 3))
            for kind, new in (("running_mean", mean), ("running_var", square / (n * h * w - 1))):
                row = rows[f"conv{block}.norm.{kind}"][step]
                row.copy_(0.9 * row + 0.1 * new.detach())
            x = centred * (square / (n * h * w) + 1e-5).rsqrt().reshape(1, c, 1, 1)
            x = x * weights[f"conv{block}.norm.weight"][step].reshape(1, c, 1, 1)
            x = x + weights[f"conv{block}.norm.bias"][step].reshape(1, c, 1, 1)
            x = F.max_pool2d(torch.where(x > 0, x, 0.01 * x), 2)
        return x.flatten(1) @ fast["linear.weight"].T + fast["linear.bias"]

    total = torch.zeros((), dtype=torch.float64)
    tasks = list(tasks)
    predictions = []
    for support_x, support_y, target_x, target_y in tasks:
        fast = {name: weights[name] for name in speeds}
        for step, weight in enumerate(step_weights):
            support_loss = -F.log_softmax(network(support_x, fast, step), 1)[range(len(support_y)), support_y].mean()
            gradients = torch.autograd.grad(support_loss, list(fast.values()), create_graph=True)
            fast = {
                name: fast[name] - speeds[name][step] * gradient for name, gradient in zip(fast, gradients, strict=True)
            }
            if weight:
                logits = network(target_x, fast, step)
                target_loss = -F.log_softmax(logits, 1)[range(len(target_y)), target_y].mean()
                total = total + weight * target_loss / len(tasks)
        predictions.append(logits.detach())
    leaves = weights | {f"lr/{name}": rate for name, rate in speeds.items()}
    gradients = torch.autograd.grad(total, list(leaves.values()))
    return Reference(total.detach(), dict(zip(leaves, gradients, strict=True)), rows, predictions=predictions)


def worst_error(found: Mapping[str, Tensor | None], expected: Mapping[str, Tensor | None]) -> tuple[float, str]:
    """The largest error and whose it is, as facts.md measures: max|a - b| over max(max|b|, 1e-3 * largest entry).

    None counts as zero: an unused parameter may have no gradient at all.
    """
    largest = max(float(value.abs().max()) for value in expected.values() if value is not None and value.numel())
    worst = (0.0, "")
    for name, value in expected.items():
        got = found.get(name)
        value = torch.zeros(()) if value is None else value
        got = torch.zeros_like(value) if got is None else got
        assert got.dim() == 0 or value.dim() == 0 or got.shape == value.shape, (name, got.shape, value.shape)
        if not value.numel():
            continue
        error = float((got.detach().cpu() - value.detach().cpu()).abs().max())
        worst = max(worst, (error / max(float(value.abs().max()), 1e-3 * largest), name))
        assert math.isfinite(error), name
    return worst


def assert_same_gradients(
    found: Mapping[str, Tensor | None], expected: Mapping[str, Tensor | None], tolerance: float = 1e-9
) -> float:
    assert set(found) == set(expected), set(found) ^ set(expected)
    error, name = worst_error(found, expected)
    assert error <= tolerance, f"{name}: relative error {error:.2e}, expected at most {tolerance:.0e}"
    return error
