"""The same meta-step through other libraries, each in its fastest plain use. All of them are optional.

The batch norms' rows and the rates stand outside of the module that a library copies: a library that differentiates
every parameter of its copy would otherwise walk back through all earlier inner steps for them.
"""

from __future__ import annotations

import importlib
import os
import warnings
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from cases import BLOCKS, EPSILON, META_LR, MOMENTUM, SLOPE, Case, TaskTensors, adapted_names, step_loss_weights
from torch import Tensor, nn
from torch.func import functional_call

Norms = list[tuple[Tensor, Tensor, Tensor, Tensor]]


class Skipped(Exception):  # noqa: N818  # it is no error
    """This setting cannot run here; the message says why."""


WHY_MISSING = {
    "learn2learn": (
        "learn2learn is not installed. Its last release, 0.2.0, does not build on Python 3.11 or newer: its C source "
        "includes longintrepr.h, which is gone there"
    ),
}


def require(module: str) -> Any:
    """The module, or Skipped."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(module)
    except ImportError as error:
        reason = WHY_MISSING.get(module, f"{module} is not installed; the extra 'bench' brings it")
        if isinstance(error, ModuleNotFoundError) and error.name == module:
            raise Skipped(reason) from error
        raise Skipped(f"{module} is installed, but its import fails: {error}") from error


class Conv4(nn.Module):
    """The network, with the batch norms' rows of a step as an argument."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        for block in range(BLOCKS):
            width = case.filters if block else case.channels
            self.add_module(f"conv{block}", nn.ModuleDict({"conv": nn.Conv2d(width, case.filters, 3, padding=1)}))
        self.linear = nn.Linear(case.features, case.ways)

    def forward(self, x: Tensor, norms: Norms) -> Tensor:
        """Logits."""
        for block, (weight, bias, mean, variance) in enumerate(norms):
            x = self.get_submodule(f"conv{block}.conv")(x)
            x = F.batch_norm(x, mean, variance, weight, bias, training=True, momentum=MOMENTUM, eps=EPSILON)
            x = F.max_pool2d(F.leaky_relu(x, SLOPE), 2)
        return self.linear(x.flatten(1))


class TorchPeer:
    """What those on torch share: the module, the tensors outside of it, Adam, and a backward pass for each task."""

    def __init__(self, case: Case, values: dict[str, Tensor], tasks: list[TaskTensors]) -> None:
        self.tasks, self.weights = tasks, step_loss_weights(case)
        like = next(iter(values.values()))
        self.model = Conv4(case).to(like.device, like.dtype)
        self.model.load_state_dict({name: values[name] for name in adapted_names(values)})
        # In the order of the module's own parameters.
        self.names = [name for name, _ in self.model.named_parameters()]
        outside = {name: value.clone().requires_grad_() for name, value in values.items() if name not in self.names}
        self.values = dict(self.model.named_parameters()) | outside
        rows = values["conv0.norm.weight"]
        self.statistics = [(torch.zeros_like(rows), torch.ones_like(rows)) for _ in range(BLOCKS)]
        self.optimizer = torch.optim.Adam(list(self.values.values()), lr=META_LR, fused=True)

    def step(self) -> None:
        """One outer update."""
        self.optimizer.zero_grad()
        for task in self.tasks:
            (self.task_loss(*task) / len(self.tasks)).backward()
        self.optimizer.step()

    def gradients(self) -> dict[str, Tensor]:
        """The last step's meta-gradient."""
        return {name: value.grad for name, value in self.values.items() if value.grad is not None}

    def norms(self, step: int) -> Norms:
        """This step's row of each batch norm: weight, bias, running mean, running variance."""
        return [
            (
                self.values[f"conv{block}.norm.weight"][step],
                self.values[f"conv{block}.norm.bias"][step],
                mean[step],
                variance[step],
            )
            for block, (mean, variance) in enumerate(self.statistics)
        ]

    def rates(self, step: int) -> list[Tensor]:
        """This step's rate of each of the module's parameters."""
        return [self.values[f"lr/{name}"][step] for name in self.names]

    def task_loss(self, support_x: Tensor, support_y: Tensor, target_x: Tensor, target_y: Tensor) -> Tensor:
        """The weighted target losses of one task."""
        raise NotImplementedError


class Higher(TorchPeer):
    """Through `higher.innerloop_ctx`, one parameter group for each tensor, as its per-tensor rates ask for."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.higher = require("higher")
        self.inner = torch.optim.SGD([{"params": [p]} for p in self.model.parameters()], lr=0.1)

    def task_loss(self, support_x: Tensor, support_y: Tensor, target_x: Tensor, target_y: Tensor) -> Tensor:
        """See TorchPeer."""
        losses = []
        with self.higher.innerloop_ctx(self.model, self.inner, copy_initial_weights=False) as (model, inner):
            for step, weight in enumerate(self.weights):
                support_loss = F.cross_entropy(model(support_x, self.norms(step)), support_y)
                inner.step(support_loss, override={"lr": self.rates(step)})
                losses.append(weight * F.cross_entropy(model(target_x, self.norms(step)), target_y))
        return torch.stack(losses).sum()


class TorchOpt(TorchPeer):
    """Through TorchOpt's functional `sgd`; its rates are one number or schedule, so those per tensor are put on top."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.torchopt = require("torchopt")
        self.inner = self.torchopt.sgd(lr=1.0, moment_requires_grad=True)

    def task_loss(self, support_x: Tensor, support_y: Tensor, target_x: Tensor, target_y: Tensor) -> Tensor:
        """See TorchPeer."""
        fast: dict[str, Tensor] = dict(self.model.named_parameters())
        state = self.inner.init(fast)
        losses = []
        for step, weight in enumerate(self.weights):
            support_loss = F.cross_entropy(self.call(fast, support_x, step), support_y)
            found = torch.autograd.grad(support_loss, list(fast.values()), create_graph=True)
            updates, state = self.inner.update(dict(zip(fast, found, strict=True)), state, inplace=False)
            updates = {name: rate * updates[name] for name, rate in zip(self.names, self.rates(step), strict=True)}
            fast = self.torchopt.apply_updates(fast, updates, inplace=False)
            losses.append(weight * F.cross_entropy(self.call(fast, target_x, step), target_y))
        return torch.stack(losses).sum()

    def call(self, fast: dict[str, Tensor], x: Tensor, step: int) -> Tensor:
        """The prediction with fast weights."""
        return functional_call(self.model, fast, (x, self.norms(step)))


class Learn2Learn(TorchPeer):
    """Through `clone_module` and `update_module`, as its own MAML does; that class has one rate for all tensors."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.library = require("learn2learn")

    def task_loss(self, support_x: Tensor, support_y: Tensor, target_x: Tensor, target_y: Tensor) -> Tensor:
        """See TorchPeer."""
        clone = self.library.clone_module(self.model)
        losses = []
        for step, weight in enumerate(self.weights):
            support_loss = F.cross_entropy(clone(support_x, self.norms(step)), support_y)
            found = torch.autograd.grad(support_loss, list(clone.parameters()), create_graph=True)
            updates = [-rate * gradient for rate, gradient in zip(self.rates(step), found, strict=True)]
            clone = self.library.update_module(clone, updates=updates)
            losses.append(weight * F.cross_entropy(clone(target_x, self.norms(step)), target_y))
        return torch.stack(losses).sum()


class Jax:
    """One jitted function from a task to its meta-gradient, called for each task; channels last, as XLA prefers.

    Its threads are XLA's own, on all the cores that the process may use. It keeps no running statistics, which the
    others record and do not use.
    """

    def __init__(self, case: Case, values: dict[str, Tensor], tasks: list[TaskTensors]) -> None:
        like = next(iter(values.values()))
        if like.device.type == "cpu":
            os.environ.setdefault("JAX_PLATFORMS", "cpu")
        jax = self.jax = require("jax")
        wanted = "gpu" if like.device.type == "cuda" else "cpu"
        if jax.default_backend() != wanted:
            raise Skipped(f"the installed jax runs on {jax.default_backend()}, not on {wanted}")
        # Its place before and after jax 0.8.
        wide = jax.enable_x64 if hasattr(jax, "enable_x64") else require("jax.experimental").enable_x64
        self.precision = partial(wide, like.dtype == torch.float64)
        self.case = case
        with self.precision():
            self.values = {name: self._array(v) for name, v in values.items()}
            self.tasks = [
                tuple(self._array(part.movedim(1, -1) if part.dim() == 4 else part, turn=False) for part in task)
                for task in tasks
            ]
            zeros = jax.tree.map(jax.numpy.zeros_like, self.values)
            self.zeros, self.state, self.count = zeros, (zeros, zeros), 0
        self._add_gradient = jax.jit(self._add_gradient_of)
        self._adam = jax.jit(self._adam_of)

    def step(self) -> None:
        """One outer update."""
        with self.precision():
            total = self.zeros
            for task in self.tasks:
                total = self._add_gradient(total, self.values, task)
            self.count += 1
            self.values, self.state = self._adam(self.values, total, self.state, self.count)
            self.total = self.jax.block_until_ready(total)
            self.jax.block_until_ready(self.values)

    def gradients(self) -> dict[str, Tensor]:
        """The last step's meta-gradient, in torch's layout."""
        found = {name: torch.tensor(value.__array__().copy()) for name, value in self.total.items()}
        return {name: value.permute(3, 2, 0, 1) if value.dim() == 4 else value for name, value in found.items()}

    def _array(self, value: Tensor, turn: bool = True) -> Any:
        numbers = value.detach().cpu()
        return self.jax.numpy.asarray((numbers.permute(2, 3, 1, 0) if turn and value.dim() == 4 else numbers).numpy())

    def _add_gradient_of(self, total: Any, values: Any, task: Any) -> Any:
        found = self.jax.grad(self._task_loss)(values, *task)
        return self.jax.tree.map(lambda old, new: old + new / self.case.tasks, total, found)

    def _adam_of(self, values: Any, gradients: Any, state: Any, count: Any) -> Any:
        jnp, tree = self.jax.numpy, self.jax.tree
        mean = tree.map(lambda m, g: 0.9 * m + 0.1 * g, state[0], gradients)
        square = tree.map(lambda s, g: 0.999 * s + 0.001 * g * g, state[1], gradients)

        def moved(value: Any, m: Any, s: Any) -> Any:
            return value - META_LR * (m / (1 - 0.9**count)) / (jnp.sqrt(s / (1 - 0.999**count)) + 1e-8)

        return tree.map(moved, values, mean, square), (mean, square)

    def _task_loss(self, values: Any, support_x: Any, support_y: Any, target_x: Any, target_y: Any) -> Any:
        jax = self.jax

        def loss(fast: Any, x: Any, y: Any, step: int) -> Any:
            logits = self._network(values, fast, x, step)
            return -jax.numpy.take_along_axis(jax.nn.log_softmax(logits), y[:, None], 1).mean()

        fast = {name: values[name] for name in adapted_names(values)}
        total = 0.0
        for step, weight in enumerate(step_loss_weights(self.case)):
            found = jax.grad(loss)(fast, support_x, support_y, step)
            fast = {name: value - values[f"lr/{name}"][step] * found[name] for name, value in fast.items()}
            total += weight * loss(fast, target_x, target_y, step)
        return total

    def _network(self, values: Any, fast: Any, x: Any, step: int) -> Any:
        jnp, lax = self.jax.numpy, self.jax.lax
        for block in range(BLOCKS):
            layout = ("NHWC", "HWIO", "NHWC")
            x = lax.conv_general_dilated(x, fast[f"conv{block}.conv.weight"], (1, 1), "SAME", dimension_numbers=layout)
            x = x + fast[f"conv{block}.conv.bias"]
            mean = x.mean((0, 1, 2))
            variance = ((x - mean) ** 2).mean((0, 1, 2))
            x = (x - mean) * lax.rsqrt(variance + EPSILON)
            x = x * values[f"conv{block}.norm.weight"][step] + values[f"conv{block}.norm.bias"][step]
            x = jnp.where(x > 0, x, SLOPE * x)
            # No maximum over an axis: its gradient asks which entries equal the maximum, and where XLA computes them a
            # second time, in another fusion, none may (seen at 64 filters: NaN). reduce_window is right, and slower.
            n, height, width, channels = x.shape
            x = x[:, : height // 2 * 2, : width // 2 * 2].reshape(n, height // 2, 2, width // 2, 2, channels)
            x = jnp.where(x[:, :, 0] >= x[:, :, 1], x[:, :, 0], x[:, :, 1])
            x = jnp.where(x[:, :, :, 0] >= x[:, :, :, 1], x[:, :, :, 0], x[:, :, :, 1])
        # Back in torch's order, in which the head's weights are.
        flat = x.transpose(0, 3, 1, 2).reshape(len(x), -1)
        return flat @ fast["linear.weight"].T + fast["linear.bias"]
