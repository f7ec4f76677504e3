"""What the tests share: a learner with unlike values in every row, the oracle on the same values, and fingerprints."""

from __future__ import annotations

import contextlib
import copy
import hashlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from keywords import grouped
from oracle import Reference, assert_same_gradients, meta_gradient
from torch import Tensor, nn

from metawrap import MAMLPlusPlus, Task

# What a line of a run's log holds that no two runs share.
MEASURED = frozenset({"seconds", "step_seconds", "peak_mib"})
STATISTICS = ("running_mean", "running_var", "target_shift", "target_log_ratio")


def build(model: nn.Module, *, seed: int = 1, method: Callable[..., Any] = MAMLPlusPlus, **options: Any) -> Any:
    """A learner whose rates, norm rows and statistics rows all differ from each other; by itself under "batch"."""
    options.setdefault("inner_steps", 2)
    if "preset" not in options:
        options.setdefault("norm", "batch")
    learner = method(model, **grouped(**options))
    generator = torch.Generator().manual_seed(seed)

    def noise(value: Tensor) -> Tensor:
        drawn = torch.rand(value.shape, generator=generator, dtype=torch.float64) - 0.5
        return drawn.to(value.dtype).to(value.device)

    with torch.no_grad():
        for name, rate in learner.learning_rates.items():
            if rate.requires_grad:
                learner.learning_rates[name].mul_(1 + 0.6 * noise(rate))
        for value in norm_values(learner):
            value.add_(0.2 * noise(value))
        for name, value in learner.model.named_buffers():
            if name.endswith(STATISTICS):
                value.add_(0.2 * noise(value))
    return learner


def poisoned(batch: tuple[Tensor, ...], task: int = 1) -> tuple[Tensor, ...]:
    """The batch with one target value of one task infinite."""
    target_x = batch[2].clone()
    target_x[task, 0, 0] = float("inf")
    return (*batch[:2], target_x, batch[3])


def norm_values(learner: Any) -> list[Tensor]:
    norms = [m for m in learner.model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    return [parameter for norm in norms for parameter in norm.parameters()]


def statistics_of(learner: Any) -> dict[str, Tensor]:
    """Running statistics with a leading row axis, whether or not the learner keeps one."""
    found = {n: b.detach().clone() for n, b in learner.model.named_buffers() if n.endswith(STATISTICS)}
    return {name: value[None] if value.dim() == 1 else value for name, value in found.items()}


def rates_of(learner: Any) -> dict[str, Tensor]:
    return {name: rate.detach().clone() for name, rate in learner.learning_rates.items()}


def gradients_of(learner: Any) -> dict[str, Tensor | None]:
    found = {name: p.grad for name, p in learner.model.named_parameters() if p.requires_grad}
    rates = {f"lr/{name}": rate.grad for name, rate in learner.learning_rates.items() if rate.requires_grad}
    return {name: None if g is None else g.detach().cpu().clone() for name, g in (found | rates).items()}


def tensors(learner: nn.Module) -> list[Tensor]:
    return [*learner.parameters(), *learner.buffers()]


def values_of(module: nn.Module) -> dict[str, Tensor]:
    """A copy of every parameter."""
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def in_dtype(batch: Iterable[Tensor], dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """The batch with its floating-point parts in another precision."""
    return tuple(part.to(dtype) if part.is_floating_point() else part for part in batch)


def as_tasks(batch: Any) -> list[tuple[Any, Any, Any, Any]]:
    return batch if isinstance(batch, list) else list(zip(*batch, strict=True))


def reference_for(model: nn.Module, learner: Any, batch: Any, step_weights: list[float], **options: Any) -> Reference:
    """The oracle on the learner's present values. The fixed rates get no gradient, so they are left out."""
    present = {"rates": rates_of(learner), "values": dict(learner.model.named_parameters())}
    reference = meta_gradient(
        model, as_tasks(batch), step_weights=step_weights, statistics=statistics_of(learner), **{**present, **options}
    )
    fixed = {f"lr/{name}" for name, rate in learner.learning_rates.items() if not rate.requires_grad}
    reference.gradients = {n: g for n, g in reference.gradients.items() if n not in fixed}
    return reference


def assert_equals_reference(learner: Any, loss: Any, reference: Reference, tolerance: float = 1e-9) -> float:
    """Loss, every meta-gradient, and the running statistics; returns the largest relative error among them."""
    error = abs(float(loss) - float(reference.loss)) / abs(float(reference.loss))
    assert error <= tolerance, (loss, reference.loss)
    error = max(error, assert_same_gradients(gradients_of(learner), reference.gradients, tolerance))
    if reference.statistics:
        error = max(error, assert_same_gradients(statistics_of(learner), reference.statistics, tolerance))
    return error


def assert_step_equals_oracle(
    learner: Any, model: nn.Module, batch: Any, step_weights: list[float], **options: Any
) -> None:
    """A meta-step of the learner has the loss, meta-gradients and statistics of the oracle on the same values."""
    reference = reference_for(model, learner, batch, step_weights, **options)
    tasks = [Task(*task) for task in batch] if isinstance(batch, list) else batch
    assert_equals_reference(learner, learner.meta_step(tasks).loss, reference)


def last_only(steps: int) -> list[float]:
    return [0.0] * (steps - 1) + [1.0]


def fingerprint(module: nn.Module, *, ids: bool = True) -> str:
    """Everything about a module that wrapping or evaluating could change; with `ids` off, values and structure only."""
    digest = hashlib.sha256()

    def add(*items: Any) -> None:
        digest.update(repr(items).encode())

    for name, part in module.named_modules(remove_duplicate=False):
        add(name, type(part).__module__, type(part).__qualname__, part.training, id(part) if ids else 0)
        hooks = (part._forward_hooks, part._forward_pre_hooks, part._backward_hooks, part._backward_pre_hooks)
        add([list(map(id, table.values())) if ids else len(table) for table in hooks])
        add(sorted(key for key in vars(part) if key not in {"_compiled_call_impl"}))
        for local, value in [*part._parameters.items(), *part._buffers.items()]:
            add(local, type(value), id(value) if ids else 0)
            if value is not None and not isinstance(value, nn.parameter.UninitializedTensorMixin):
                add(value.requires_grad, value.dtype, value.shape)
                digest.update(
                    value.detach().cpu().to_dense().contiguous().flatten().view(torch.uint8).numpy().tobytes()
                )
                add(None if value.grad is None else float(value.grad.sum()))
    return digest.hexdigest()


@contextlib.contextmanager
def unchanged(*modules: nn.Module) -> Iterator[None]:
    """What runs inside leaves these modules as they were, down to their objects, hooks and flags."""
    before = [fingerprint(module) for module in modules]
    yield
    assert [fingerprint(module) for module in modules] == before


def snapshot(value: Any) -> Any:
    return copy.deepcopy(value)


def assert_same_state(found: Any, expected: Any, where: str = "") -> None:
    """Two nested states (dicts, lists, tensors, numbers) are equal to the last bit."""
    if isinstance(expected, Tensor):
        assert found.shape == expected.shape, where
        assert torch.equal(found.nan_to_num(12345.0), expected.nan_to_num(12345.0)), where
    elif isinstance(expected, dict):
        assert set(found) == set(expected), where
        for key in expected:
            assert_same_state(found[key], expected[key], f"{where}/{key}")
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected), where
        for index, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert_same_state(one, other, f"{where}/{index}")
    else:
        assert found == expected, (where, found, expected)


def assert_same_values(found: Iterable[Tensor], expected: Iterable[Tensor], tolerance: float = 1e-9) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.detach(), other.detach(), rtol=tolerance, atol=tolerance)


def spied(monkeypatch: Any, owner: type, name: str, note: Callable[..., Any]) -> list[Any]:
    """What `note` says of the arguments of every call of that method, from now on."""
    original, seen = getattr(owner, name), []

    def spy(*args: Any, **options: Any) -> Any:
        seen.append(note(*args))
        return original(*args, **options)

    monkeypatch.setattr(owner, name, spy)
    return seen
