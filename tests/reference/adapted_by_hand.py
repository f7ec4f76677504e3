"""Adaptation under every norm policy as one would write it without any library."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from deployed_cases import ALL, STEPS, call, wrapped
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

Moments = dict[str, tuple[Tensor, Tensor]]


def by_hand(name: str, norm: str, steps: int, unwrapped: bool = False) -> Any:
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
        by_batch(True)
        with blended(norms, values, norm, len(support_y)):
            loss = case.loss(call(model, support_x), support_y)
        rates = {path: learner.learning_rates[path].detach()[row] for path in learner.learning_rates}
        gradients = torch.autograd.grad(loss, [own[path] for path in rates])
        for (path, rate), gradient in zip(rates.items(), gradients, strict=True):
            own[path].data.sub_(rate * (gradient.to_dense() if gradient.is_sparse else gradient))
    put(max(0, min(steps, STEPS) - 1))
    by_batch(norm == "batch")
    if norm.startswith("task"):
        context: Moments = {}
        with torch.no_grad():
            with blended(norms, values, norm, len(support_y), note=context):
                call(model, support_x)
            with blended(norms, values, norm, len(support_y), context):
                return call(model, target_x)
    if norm != "batch" and not unwrapped:
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
            if norm == "running":
                eps, row = norms[path].eps, max(0, min(steps, STEPS) - 1)
                shift, ratio = (values[f"{path}.target_{kind}"] for kind in ("shift", "log_ratio"))
                shift, ratio = (kind[row] if kind.dim() > 1 else kind for kind in (shift, ratio))
                mean = mean + shift * (variance + eps).sqrt()
                variance = (variance + eps) * torch.exp(2 * ratio) - eps
            norms[path].track_running_stats = True
            norms[path].running_mean, norms[path].running_var = mean, variance
    with torch.no_grad():
        return call(model, target_x)


@contextlib.contextmanager
def blended(
    norms: dict[str, Any],
    values: dict[str, Any],
    norm: str,
    examples: int,
    context: Moments | None = None,
    note: Moments | None = None,
) -> Iterator[None]:
    """Under TaskNorm the norms blend the moments of a support set with those of each example (arXiv:2003.03284)."""
    handles, kept = [], {}
    for path, layer in norms.items() if norm.startswith("task") else ():
        kept[path] = layer.training, layer.track_running_stats, layer.running_mean, layer.running_var
        layer.eval()
        layer.track_running_stats = True
        like = values[f"{path}.blend_scale"]
        layer.running_mean = torch.zeros(layer.num_features).to(like)
        layer.running_var = torch.ones(layer.num_features).to(like) - layer.eps

        def hook(module: Any, args: tuple[Tensor, ...], path: str = path) -> tuple[Tensor, ...]:
            x = args[0]
            over, view = [axis for axis in range(x.dim()) if axis != 1], [1, -1] + [1] * (x.dim() - 2)
            mean, variance = (context or {}).get(path) or (x.mean(over), x.var(over, correction=0))
            if note is not None:
                note[path] = mean, variance
            scale, offset = (values[f"{path}.blend_{kind}"].detach() for kind in ("scale", "offset"))
            a = 1 / (1 + torch.exp(-scale * examples - offset))
            each = list(range(1 if norm == "task_layer" else 2, x.dim()))
            own = x.mean(each, keepdim=True) if each else x
            spread = x.var(each, correction=0, keepdim=True) if each else torch.zeros_like(x)
            mean, variance = mean.view(view), variance.view(view)
            middle = a * mean + (1 - a) * own
            whole = a * (variance + (mean - middle) ** 2) + (1 - a) * (spread + (own - middle) ** 2)
            return ((x - middle) / torch.sqrt(whole + module.eps), *args[1:])

        handles.append(layer.register_forward_pre_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for path, (training, tracks, mean, variance) in kept.items():
            norms[path].train(training)
            norms[path].track_running_stats, norms[path].running_mean, norms[path].running_var = tracks, mean, variance
