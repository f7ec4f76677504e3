"""One row of the zoo: a network that people bring, a task for it, and what must come of it.

The reference is the hand-written loop of tests/reference/oracle.py on the module's own parameters; no engine is
compared with itself or with another.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from differences import AT_MOST, difference_error
from face import assert_equals_reference, build, fingerprint, rates_of, reference_for
from models import seeded
from not_derivatives import IN_FLOAT32, REASONS
from oracle import Reference, msl_weights
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode

from metawrap import MetaWrapWarning, UnsupportedModuleError

STEPS, EPOCH, ANNEAL_EPOCHS = 2, 1, 5
SEED = 7


@dataclass(frozen=True, eq=False)
class Entry:
    """A network and how it is tried.

    make: builds the network; it is put in float64, train mode, with norm scales that are not trivial.
    tasks: builds the list of (support_x, support_y, target_x, target_y), without a task axis.
    options: more keywords of the learner. after_norm: what norms of a class do after normalising, for the reference.
    refused: where every engine must refuse the network: a pattern that the error's text must match (module, cause,
    fix). higher: False where inspection must keep `higher` away from it, and a named `higher` must be refused.
    plain: the same network for the reference, where `make` puts it, or a part of it, into a wrapper.
    adapted_alone: False where an adapted module draws or counts otherwise than the loop does.
    sets_itself_up: True where its own forward changes the module for good at the first call.
    tolerance: relative error that is allowed; more than 1e-9 only where part of the network is not in float64.
    quick: whether it runs by default; `make zoo` runs all. needs: a package that only `make zoo` installs.
    note: what the table says beside it.
    """

    name: str
    family: str
    make: Callable[[], nn.Module]
    tasks: Callable[[], list[tuple[Any, Any, Any, Any]]]
    loss_fn: Callable[[Any, Any], Tensor] = F.cross_entropy
    inner_lr: float = 0.1
    options: Mapping[str, Any] = field(default_factory=dict)
    after_norm: Mapping[type, Callable[[Tensor], Tensor]] = field(default_factory=dict)
    refused: str | None = None
    higher: bool = True
    plain: Callable[[], nn.Module] | None = None
    adapted_alone: bool = True
    sets_itself_up: bool = False
    tolerance: float = 1e-9
    quick: bool = False
    needs: str = ""
    note: str = ""


@dataclass(frozen=True)
class Outcome:
    """What a check came to: "equal" (with the engine that ran and the largest relative error) or "refused"."""

    result: str
    parameters: int
    engine: str = ""
    error: float | None = None


def check(entry: Entry, engine: str) -> Outcome:
    """Tries one network under one engine: "functional", "higher", or "threads": functional with two workers.

    "differences" is no engine: the plain loop itself is tried.
    """
    if engine == "differences":
        return check_differences(entry)
    return _check(entry, engine)


def _check(entry: Entry, engine: str) -> Outcome:
    model = seeded(entry.make)
    parameters = sum(p.numel() for p in model.parameters() if not is_lazy(p))
    before = fingerprint(model)
    if entry.refused is not None:
        with pytest.raises(UnsupportedModuleError, match=entry.refused):
            _learner(entry, model, engine).meta_step(entry.tasks())
        outcome = Outcome("refused", parameters)
    elif engine == "higher" and not entry.higher:
        with pytest.raises(UnsupportedModuleError, match=r"functional"):
            _learner(entry, model, engine).meta_step(entry.tasks())
        outcome = Outcome("refused", parameters)
    else:
        outcome = Outcome("equal", parameters, *_compare(entry, model, engine))
    assert fingerprint(model) == before, "the user's own module was changed"
    return outcome


def _compare(entry: Entry, model: nn.Module, engine: str) -> tuple[str, float]:
    learner = _learner(entry, model, engine)
    learner.epoch = EPOCH
    reference = _reference(entry)
    torch.manual_seed(SEED)  # Dropout must draw the same masks as in the reference.
    metrics = learner.meta_step(entry.tasks())
    error = assert_equals_reference(learner, metrics.loss, reference, entry.tolerance)
    assert_same_buffers(learner, reference)
    assert any(g is not None and bool(g.abs().max() > 0) for n, g in reference.gradients.items() if n.startswith("lr/"))
    assert entry.plain is None or learner.describe().notes
    assert entry.higher or learner.describe().engine == "functional"
    return str(learner.describe().engine), error


def check_evaluation(entry: Entry, engine: str) -> None:
    """Evaluation, and the modules that `adapt` returns, equal the plain loop in eval mode; the learner is unchanged."""
    learner = _learner(entry, seeded(entry.make), engine)
    reference = _reference(entry, training=False)
    if entry.sets_itself_up:
        learner.evaluate(entry.tasks())
    before = fingerprint(learner)
    torch.manual_seed(SEED)
    found = learner.evaluate(entry.tasks())
    assert abs(found.loss - float(reference.loss)) <= 1e-9 * abs(float(reference.loss)), (found.loss, reference.loss)
    losses = [_adapted_loss(entry, learner, task) for task in entry.tasks()] if entry.adapted_alone else []
    assert fingerprint(learner) == before
    if losses:
        assert abs(sum(losses) / len(losses) - found.loss) <= 1e-9 * abs(found.loss), (losses, found.loss)


def _adapted_loss(entry: Entry, learner: Any, task: tuple[Any, Any, Any, Any]) -> float:
    support_x, support_y, target_x, target_y = task
    adapted = learner.adapt(support_x, support_y)
    target_x = target_x if isinstance(target_x, dict | tuple) else (target_x,)
    output = adapted(**target_x) if isinstance(target_x, dict) else adapted(*target_x)
    return float(entry.loss_fn(output, target_y).detach())


def assert_same_buffers(learner: Any, reference: Reference) -> None:
    """What the user's own code counts or averages in its forward is as in the plain loop."""
    buffers = dict([*learner.model.named_buffers(), *learner.model.named_parameters()])
    for name, expected in reference.buffers.items():
        torch.testing.assert_close(buffers[name], expected, rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


def check_differences(entry: Entry) -> Outcome:
    """The plain loop's meta-gradient is that of finite differences, or is not, for the reason in REASONS."""
    model = seeded(entry.plain or entry.make)
    parameters = sum(p.numel() for p in model.parameters() if not is_lazy(p))
    if entry.refused is not None:
        return Outcome("", parameters)
    learner, converts = _learner(entry, model, "functional"), entry.name in IN_FLOAT32
    values = {name: value.detach() for name, value in learner.model.named_parameters()}
    values |= {f"lr/{name}": rate for name, rate in rates_of(learner).items()}
    with InDouble() if converts else nullcontext():
        gradients = (_run_reference(entry, model, learner) if converts else _reference(entry)).gradients
        error = difference_error(partial(_loss_at, entry, learner, gradients), values, gradients)
    reason = REASONS.get(entry.name)
    assert (error <= AT_MOST) is (reason is None), (error, reason)
    return Outcome(reason or f"{error:.0e}{', in float64' if converts else ''}", parameters)


class InDouble(TorchFunctionMode):
    """Converts to float64 where a network converts to float32."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        func = Tensor.double if func is Tensor.float else func
        double = lambda value: torch.float64 if value is torch.float32 else value
        return func(*map(double, args), **{name: double(value) for name, value in (kwargs or {}).items()})


def _loss_at(entry: Entry, learner: Any, gradients: Mapping[str, Tensor | None], values: dict[str, Tensor]) -> float:
    rates = {name: values[f"lr/{name}"] for name in rates_of(learner)}
    own = {name: value for name, value in values.items() if not name.startswith("lr/")}
    # A new model: the one before may have counted or cached something.
    model, present = seeded(entry.plain or entry.make), dict(learner.model.named_parameters())
    for path, module in model.named_modules():
        name, padding = f"{path}.weight", getattr(module, "padding_idx", None)
        if padding is not None and (g := gradients.get(name)) is not None and not g[padding].any():
            # The row counts in the loss, and torch gives it no gradient: it stays where it is.
            own[name] = own[name].index_copy(0, torch.tensor([padding]), present[name].detach()[padding, None])
    return float(_run_reference(entry, model, learner, rates=rates, values=own, loss_alone=True).loss)


@lru_cache(maxsize=1)
def _reference(entry: Entry, training: bool = True) -> Reference:
    model = seeded(entry.plain or entry.make)
    learner = _learner(entry, model, "functional")  # For the rates, norm rows and statistics that `build` draws.
    return _run_reference(entry, model, learner, training)


def _run_reference(entry: Entry, model: nn.Module, learner: Any, training: bool = True, **options: Any) -> Reference:
    torch.manual_seed(SEED)
    return reference_for(
        model,
        learner,
        entry.tasks(),
        msl_weights(STEPS, EPOCH, ANNEAL_EPOCHS if training else 0),
        loss_fn=entry.loss_fn,
        after_norm=entry.after_norm,
        kept=learner.wrapped.kept,
        norm=entry.options.get("norm", "batch"),
        training=training,
        in_place=True,
        **options,
    )


def _learner(entry: Entry, model: nn.Module, engine: str) -> Any:
    threads: dict[str, Any] = {"engine": "functional", "workers": 2} if engine == "threads" else {"engine": engine}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MetaWrapWarning)
        return build(
            model,
            **threads,
            inner_steps=STEPS,
            inner_lr=entry.inner_lr,
            multi_step_loss=True,
            msl_epochs=ANNEAL_EPOCHS,
            first_order_epochs=0,
            loss_fn=entry.loss_fn,
            **entry.options,
        )
