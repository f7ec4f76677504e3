"""Adaptation under every norm policy as one would write it without any library."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from deployed_cases import ALL, STEPS, call, wrapped
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def by_hand(name: str, norm: str, steps: int) -> Any:
    """The target prediction of MAML++ as one would write it without any library: a fresh original, and a loop of SGD.

    Of the learner only the values are read: initial weights, rates, norm rows.
    """
    case, (_, learner) = ALL[name], wrapped(name, norm)
    support_x, support_y, target_x, _ = case.task()
    model = case.original()
    norms = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, _BatchNorm) and path != case.options.get("keep_norm")
    }
    own = dict(model.named_parameters())
    values = dict(learner.model.named_parameters()) | dict(learner.model.named_buffers())

    def put(row: int) -> None:
        """The norms' own tensors, at a row; a norm that runs on its batch stands in training mode."""
        for path, module in norms.items():
            for local, tensor in module.state_dict().items():
                value = values[f"{path}.{local}"].detach()
                if f"{path}.{local}" not in learner.learning_rates:
                    tensor.copy_(value[row] if value.dim() > tensor.dim() else value)

    def by_batch(on: bool) -> None:
        for module in norms.values():
            module.train(on)

    for path, tensor in model.state_dict().items():
        if path in values and tensor.shape == values[path].shape:  # tied ones have one name there
            tensor.copy_(values[path].detach())
    for step in range(steps):
        row = min(step, STEPS - 1)
        put(row)
        by_batch(norm != "running")
        loss = case.loss(call(model, support_x), support_y)
        rates = {path: learner.learning_rates[path].detach()[row] for path in learner.learning_rates}
        gradients = torch.autograd.grad(loss, [own[path] for path in rates])
        for (path, rate), gradient in zip(rates.items(), gradients, strict=True):
            own[path].data.sub_(rate * (gradient.to_dense() if gradient.is_sparse else gradient))
    put(max(0, min(steps, STEPS) - 1))
    by_batch(norm == "batch")
    if norm == "support":
        by_batch(True)
        seen: dict[str, tuple[Tensor, Tensor]] = {}

        def watch(path: str) -> Callable[..., None]:
            def moments(module: nn.Module, args: tuple[Tensor, ...]) -> None:
                over = [axis for axis in range(args[0].dim()) if axis != 1]
                seen[path] = args[0].mean(over), args[0].var(over, correction=0)

            return moments

        handles = [module.register_forward_pre_hook(watch(path)) for path, module in norms.items()]
        with torch.no_grad():
            call(model, support_x)
        for handle in handles:
            handle.remove()
        by_batch(False)
        for path, (mean, variance) in seen.items():
            norms[path].track_running_stats = True
            norms[path].running_mean, norms[path].running_var = mean, variance
    with torch.no_grad():
        return call(model, target_x)
