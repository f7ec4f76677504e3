"""The same meta-step through other libraries, each in its fastest plain use. All of them are optional.

The rows of the batch norms and the rates are kept outside of the module that a library copies. A library that
differentiates every parameter of its copy would otherwise go back through all earlier inner steps for them.
"""

from __future__ import annotations

import importlib
import os
import warnings
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from rivals.cases import BLOCKS, EPSILON, META_LR, SLOPE, Case, TaskTensors, adapted_names, step_loss_weights
from rivals.plain import Norm, PlainLoop, after_convolution, updated


class Skipped(Exception):  # noqa: N818  # it is no error
    """A setting cannot run here; the message says why."""


WHY_MISSING = {
    "learn2learn": (
        "learn2learn is not installed. Its last release, 0.2.0, does not build on Python 3.11 or newer: its C source "
        "includes longintrepr.h, which is gone there. Its folder utils is pure Python and runs on PYTHONPATH: see "
        "benchmarks/results/README.md"
    )
}


def require(module: str) -> Any:
    """Imports a module, or raises Skipped."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        reason = WHY_MISSING.get(package, f"{package} is not installed; the extra 'bench' brings it")
        if isinstance(error, ModuleNotFoundError) and error.name == package:
            raise Skipped(reason) from error
        raise Skipped(f"{module} is installed, but its import fails: {error}") from error


class Conv4(nn.Module):
    """The network. `forward` takes the rows of the batch norms for the present inner step."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        for block in range(BLOCKS):
            width = case.filters if block else case.channels
            self.add_module(f"conv{block}", nn.ModuleDict({"conv": nn.Conv2d(width, case.filters, 3, padding=1)}))
        self.linear = nn.Linear(case.features, case.ways)

    def forward(self, x: Tensor, norms: list[Norm]) -> Tensor:
        """Logits."""
        for block, norm in enumerate(norms):
            x = after_convolution(self.get_submodule(f"conv{block}.conv")(x), norm)
        return self.linear(x.flatten(1))


class TorchLibrary(PlainLoop):
    """The plain loop on a module, whose copies with fast weights come from a library."""

    library: str

    def __init__(self, case: Case, values: dict[str, Tensor], tasks: list[TaskTensors]) -> None:
        self.module = require(self.library)
        like = next(iter(values.values()))
        self.model = Conv4(case).to(like.device, like.dtype)
        self.model.load_state_dict({name: values[name] for name in adapted_names(values)})
        super().__init__(case, values, tasks)
        # The libraries expect the order of the module's own parameters.
        self.adapted = [name for name, _ in self.model.named_parameters()]

    def learned(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """The module's parameters, and tensors outside of it."""
        return super().learned(values) | dict(self.model.named_parameters())

    def predict(self, fast: Any, x: Tensor, step: int) -> Tensor:
        """Logits of a copy of the module."""
        return fast(x, self.norms(step))


class Higher(TorchLibrary):
    """Through `higher.innerloop_ctx`, with a parameter group for each tensor, because each has its own rate."""

    library = "higher"

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.inner = torch.optim.SGD([{"params": [p]} for p in self.model.parameters()], lr=0.1)

    def start(self) -> AbstractContextManager[Any]:
        """A copy of the module, and its differentiable optimizer."""
        return self.module.innerloop_ctx(self.model, self.inner, copy_initial_weights=False)

    def predict(self, fast: Any, x: Tensor, step: int) -> Tensor:
        """Logits of higher's copy."""
        return super().predict(fast[0], x, step)

    def inner_step(self, fast: Any, support_loss: Tensor, step: int) -> Any:
        """By the differentiable optimizer."""
        fast[1].step(support_loss, override={"lr": self.rates(step)})
        return fast


class TorchOpt(TorchLibrary):
    """Through TorchOpt's functional `sgd`, whose rate is one number or schedule: the rates per tensor multiply it."""

    library = "torchopt"

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.inner = self.module.sgd(lr=1.0, moment_requires_grad=True)

    def start(self) -> AbstractContextManager[Any]:
        """The parameters, and the state of the optimizer."""
        fast: dict[str, Tensor] = dict(self.model.named_parameters())
        return nullcontext((fast, self.inner.init(fast)))

    def predict(self, fast: Any, x: Tensor, step: int) -> Tensor:
        """Logits with fast weights."""
        return functional_call(self.model, fast[0], (x, self.norms(step)))

    def inner_step(self, fast: Any, support_loss: Tensor, step: int) -> Any:
        """By TorchOpt's update rule."""
        weights, state = fast
        found = torch.autograd.grad(support_loss, list(weights.values()), create_graph=True)
        updates, state = self.inner.update(dict(zip(weights, found, strict=True)), state, inplace=False)
        updates = {name: rate * updates[name] for name, rate in zip(self.adapted, self.rates(step), strict=True)}
        return self.module.apply_updates(weights, updates, inplace=False), state


class Learn2Learn(TorchLibrary):
    """Through `clone_module` and `update_module`, as learn2learn's MAML does, whose rate is one for all tensors."""

    library = "learn2learn"

    def start(self) -> AbstractContextManager[Any]:
        """A clone of the module."""
        return nullcontext(self.module.clone_module(self.model))

    def inner_step(self, fast: Any, support_loss: Tensor, step: int) -> Any:
        """By `update_module`."""
        found = torch.autograd.grad(support_loss, list(fast.parameters()), create_graph=True)
        updates = [-rate * gradient for rate, gradient in zip(self.rates(step), found, strict=True)]
        return self.module.update_module(fast, updates=updates)


class Iteryne(TorchLibrary):
    """Through the learners of iteryne's MAML. A learner takes a rate for each tensor, as its MetaSGD does."""

    library = "iteryne"

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.maml = self.module.MAML(self.model)

    def start(self) -> AbstractContextManager[Any]:
        """A learner with the module's parameters."""
        return nullcontext(self.maml.clone())

    def inner_step(self, fast: Any, support_loss: Tensor, step: int) -> Any:
        """By the learner."""
        fast.lr = dict(zip(self.adapted, self.rates(step), strict=True))
        return fast.adapt(support_loss)


class ParallelMetalearn:
    """parallel-metalearn's own `MAML.step`, which imports as `metalearn`: all tasks at once, by vmap.

    The library's batch norm learns one scale and shift for all steps. For this reason the network is `SteppedConv4`,
    with rows of its own. Running statistics, which the others record and do not use, are left out.
    """

    def __init__(self, case: Case, values: dict[str, Tensor], tasks: list[TaskTensors]) -> None:
        learn, rules, losses = (require(f"metalearn.{part}") for part in ("algorithms", "inner_optimizers", "loss"))
        like = next(iter(values.values()))
        self.model = SteppedConv4(case).to(like.device, like.dtype)
        self.model.load_state_dict({name: value for name, value in values.items() if not name.startswith("lr/")})
        fast = self.model.get_fast_weights()
        inner = rules.InnerSGD(fast, max_inner_steps=case.steps, per_layer=True, per_step=True).to(like.dtype)
        self.rates = {f"lr/{name}": inner.lrs[f"lr_{name.replace('.', '_')}"] for name in fast}
        with torch.no_grad():
            for name, rate in self.rates.items():
                rate.copy_(values[name])
        loss = losses.CrossEntropy(losses.CategoricalAccuracy())
        self.maml = learn.MAML(
            model=self.model,
            optimizer=torch.optim.Adam(self.model.parameters(), lr=META_LR, fused=True),
            inner_optimizer=inner,
            support_loss_fn=loss,
            query_loss_fn=self._target_loss(loss, case.steps),
            inner_steps=case.steps,
            multi_step_loss=True,
            chunk_size=case.tasks,
            device=like.device,
        )
        support_x, support_y, target_x, target_y = (torch.stack(parts) for parts in zip(*tasks, strict=True))
        self.batch = support_x, {"labels": support_y}, target_x, {"labels": target_y}

    def step(self) -> None:
        """One outer update, of epoch 0."""
        self.maml.step(iter([self.batch]), epoch=0, epochs=1)

    def gradients(self) -> dict[str, Tensor]:
        """The last step's meta-gradient."""
        learned = dict(self.model.named_parameters()) | self.rates
        return {name: value.grad for name, value in learned.items() if value.grad is not None}

    @staticmethod
    def _target_loss(loss: nn.Module, steps: int) -> nn.Module:
        # Release 0.5.6 divides each target loss by its weight, where the paper multiplies. At epoch 0 all weights are
        # 1 / steps (here a float32 number), so a loss that is multiplied by both becomes the weighted loss.
        weight = float(require("metalearn.algorithms.MetaUtils").get_per_step_loss_weights(steps, 0, 1)[0])

        class Weighted(nn.Module):
            def forward(self, **arguments: Any) -> tuple[Tensor, Tensor]:
                value, accuracy = loss(**arguments)
                return value * (weight / steps), accuracy

        return Weighted()


class SteppedConv4(Conv4):
    """Conv4 with the rows of its batch norms inside, in the form that parallel-metalearn calls."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        for block in range(BLOCKS):
            rows = {part: torch.empty(case.steps, case.filters) for part in ("weight", "bias")}
            self.get_submodule(f"conv{block}")["norm"] = nn.ParameterDict(rows)

    def forward(self, x: Tensor, num_step: int, training: bool) -> dict[str, Tensor]:
        """Logits, by the rows of this step."""
        rows = [self.get_submodule(f"conv{block}.norm") for block in range(BLOCKS)]
        norms = [(row["weight"][num_step], row["bias"][num_step], None, None) for row in rows]
        return {"logits": super().forward(x, norms)}

    def get_fast_weights(self) -> dict[str, Tensor]:
        """The parameters that the inner loop adapts."""
        return {name: value for name, value in self.named_parameters() if ".norm." not in name}


class Jax:
    """One jitted function from a task to its meta-gradient, called for each task; channels last, as XLA prefers.

    XLA runs threads of its own, on all cores that the process may use. Running statistics, which the others record and
    do not use, are left out.
    """

    def __init__(self, case: Case, values: dict[str, Tensor], tasks: list[TaskTensors]) -> None:
        like = next(iter(values.values()))
        if like.device.type == "cpu":
            os.environ.setdefault("JAX_PLATFORMS", "cpu")
        jax = self.jax = require("jax")
        wanted = "gpu" if like.device.type == "cuda" else "cpu"
        if jax.default_backend() != wanted:
            raise Skipped(f"the installed jax runs on {jax.default_backend()}, not on {wanted}")
        # `enable_x64` moved in jax 0.8.
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
            fast = updated(fast, [values[f"lr/{name}"][step] for name in fast], [found[name] for name in fast])
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
            # Comparisons in place of a maximum over an axis: the gradient of the maximum asks which entries equal it,
            # and XLA may compute the entries again in another fusion, so that none is equal (at 64 filters: NaN).
            # reduce_window is right, and slower.
            n, height, width, channels = x.shape
            x = x[:, : height // 2 * 2, : width // 2 * 2].reshape(n, height // 2, 2, width // 2, 2, channels)
            x = jnp.where(x[:, :, 0] >= x[:, :, 1], x[:, :, 0], x[:, :, 1])
            x = jnp.where(x[:, :, :, 0] >= x[:, :, :, 1], x[:, :, :, 0], x[:, :, :, 1])
        # The head's weights are in torch's order.
        flat = x.transpose(0, 3, 1, 2).reshape(len(x), -1)
        return flat @ fast["linear.weight"].T + fast["linear.bias"]
