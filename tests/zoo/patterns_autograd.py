"""Forwards that speak with autograd: own functions, gradients inside, detached parts, in-place edits, control flow."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from entry import Entry
from pieces import VECTORS, Around, Between, Body, Calls
from stateful import Once
from torch import Tensor, nn
from torch.autograd import Function
from torch.utils.checkpoint import checkpoint, checkpoint_sequential


# --- functions of one's own ------------------------------------------------------------------------------------------
class Cube(Function):
    """The old form; its backward is made of differentiable operations."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.scale = scale
        return scale * x**3

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return gradient * 3 * ctx.scale * x**2, None


class NewCube(Function):
    """The new form, with a context that is set up apart."""

    @staticmethod
    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        return x**3, x**2

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx: Any, cubed: Tensor, squared: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return cubed * 3 * x**2 + squared * 2 * x


class Straight(Function):
    """Straight-through sign: what quantised networks train with."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.sign()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class Reverse(Function):
    """Gradient reversal, as domain adaptation uses it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return -0.5 * gradient


class InPlace(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x.clamp_(min=-0.1)
        ctx.mark_dirty(x)
        ctx.save_for_backward(x)
        return x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradient * (x > -0.1)


def _sine(x: Tensor) -> Tensor:
    return torch.sin(x)


_compiled_sine = torch.compile(_sine, backend="aot_eager")


class Compiled(nn.Module):
    """Calls a function that is compiled; torch differentiates it once."""

    def forward(self, x: Tensor) -> Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _compiled_sine(x)


# --- torch.func and gradients inside ---------------------------------------------------------------------------------
class PerExample(Body):
    """vmap over the examples."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.func.vmap(lambda row: self.last(torch.tanh(self.first(row))))(x)


class Jacobian(Body):
    """Its features are the derivatives of a scalar field with respect to the input."""

    def field(self, row: Tensor) -> Tensor:
        return torch.tanh(self.first(row)).square().sum()

    def forward(self, x: Tensor) -> Tensor:
        slopes = torch.func.vmap(torch.func.jacrev(self.field))(x)
        return self.last(torch.tanh(self.first(slopes)))


class Ensemble(Body):
    """functional_call with stacked weights made of its own."""

    def forward(self, x: Tensor) -> Tensor:
        scales = torch.tensor([0.9, 1.1], dtype=x.dtype)
        weights = {name: p * scales.view(-1, *[1] * p.dim()) for name, p in self.first.named_parameters()}
        out = torch.func.vmap(lambda w: torch.func.functional_call(self.first, w, (x,)))(weights)
        return self.last(torch.tanh(out).mean(0))


class Energy(Body):
    """Two gradient steps on the input inside the forward; `create_graph` keeps them differentiable."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x if x.requires_grad else x.clone().requires_grad_()
            for _ in range(2):
                energy = torch.tanh(self.first(x)).square().sum()
                (slope,) = torch.autograd.grad(energy, x, create_graph=True)
                x = x - 0.1 * slope
        return super().forward(x)


class Penalised(Body):
    """Returns its own gradient penalty beside the logits."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            x = x.clone().requires_grad_()
            logits = super().forward(x)
            (slope,) = torch.autograd.grad(logits.sum(), x, create_graph=True)
        return logits, slope.square().mean()


def _penalised(output: Any, y: Tensor) -> Tensor:
    return F.cross_entropy(output[0], y) + 0.1 * output[1]


def _fixed_point(model: Any, x: Tensor) -> Tensor:
    """A fixed point found without gradients, and one step with: a deep equilibrium model."""
    with torch.no_grad():
        z = torch.zeros_like(x)
        for _ in range(5):
            z = torch.tanh(0.3 * model.mix(z) + x)
    return torch.tanh(0.3 * model.mix(z) + x)


class NoGradPart(Body):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            features = torch.tanh(self.first(x))
        return self.last(features)


# --- in-place --------------------------------------------------------------------------------------------------------
def _edits_hidden(_: Any, x: Tensor) -> Tensor:
    x = x.add_(0.1).mul_(1.1)
    x[:, 0] = x[:, 1] * 2
    x[x > 1] *= 0.5
    return F.leaky_relu_(x, 0.1)


class EditsView(Body):
    """Edits a view of what a parameter gave."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.first.weight * 1.0
        weight[0].mul_(2)
        weight.view(-1)[3:5].zero_()
        return self.last(torch.tanh(F.linear(x, weight, self.first.bias)))


class ClampsWeight(Body):
    """Clips its weights before use, as a Wasserstein critic does."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.first.weight.clamp_(-0.4, 0.4)
        return super().forward(x)


def _fills(_: Any, x: Tensor) -> Tensor:
    out = torch.empty_like(x)
    for index in range(x.shape[1]):
        out[:, index] = torch.tanh(x[:, index]) * (index + 1) / 6
    return out


# --- checkpointing ---------------------------------------------------------------------------------------------------
def _checkpointed(reentrant: bool, model: Any, x: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return checkpoint(lambda y: torch.tanh(model.middle(y)), x, use_reentrant=reentrant)


def _checkpointed_in_training(model: Any, x: Tensor) -> Tensor:
    return _checkpointed(False, model, x) if model.training else torch.tanh(model.middle(x))


_entry = partial(Entry, family="autograd", tasks=VECTORS, quick=True)
_twice = r"(?s)'layer' \(Calls\).*{}.*(FOMAML|first_order_epochs=math\.inf)"
_checkpointing = r"(?i)checkpoint"

PATTERNS = [
    _entry("function of one's own", make=lambda: Around(lambda x: Cube.apply(x, 0.5))),
    _entry("function of one's own, new form", make=lambda: Around(lambda x: sum(NewCube.apply(x)))),
    _entry("function of one's own, straight through", make=lambda: Around(Straight.apply)),
    _entry("function of one's own, gradient reversal", make=lambda: Around(Reverse.apply)),
    _entry("function of one's own, in place", make=lambda: Around(InPlace.apply)),
    _entry("function of one's own, once", make=lambda: Around(Calls(Once.apply)), refused=_twice.format("Once")),
    _entry(
        "function of one's own, once, below the head",
        make=lambda: Around(Calls(Once.apply)),
        options={"adapt": "last.*"},
    ),
    _entry(
        "compiled function",
        make=lambda: Around(Compiled()),
        refused=_twice.replace("Calls", "Compiled").format("double backward"),
    ),
    _entry("vmap over examples", make=PerExample),
    _entry("jacrev of an inner function", make=Jacobian),
    _entry("functional_call under vmap", make=Ensemble, higher=False),
    _entry("gradient steps on the input", make=Energy),
    _entry("gradient penalty", make=Penalised, loss_fn=_penalised),
    _entry("fixed point", make=lambda: Between(_fixed_point, mix=nn.Linear(6, 6))),
    _entry("part under no_grad", make=NoGradPart),
    _entry("detached path", make=lambda: Between(lambda _, x: torch.tanh(x) * torch.sigmoid(x).detach())),
    _entry(".data", make=lambda: Between(lambda _, x: torch.tanh(x - x.data.mean(0)))),
    _entry(
        ".item() in the arithmetic", make=lambda: Between(lambda _, x: torch.tanh(x / (1.0 + x.abs().max().item())))
    ),
    _entry("in place on hidden values", make=partial(Between, _edits_hidden)),
    _entry("in place on views of weights", make=EditsView),
    _entry("in place on the weights themselves", make=ClampsWeight),
    _entry("fills a fresh tensor", make=partial(Between, _fills)),
    *(
        _entry(f"checkpointing, {name}", make=make, refused=_checkpointing)
        for name, make in {
            "reentrant": lambda: Between(partial(_checkpointed, True), middle=nn.Linear(6, 6)),
            "not reentrant": lambda: Between(partial(_checkpointed, False), middle=nn.Linear(6, 6)),
            "in training only": lambda: Between(_checkpointed_in_training, middle=nn.Linear(6, 6)),
            "sequential": lambda: Between(
                lambda model, x: checkpoint_sequential(model.middle, 2, x, use_reentrant=False),
                middle=nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)),
            ),
        }.items()
    ),
]
