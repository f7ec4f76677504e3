"""What `adapt` and `unwrap` return is the user's own class and nothing else, and works like any module."""

from __future__ import annotations

import copy
import pickle
import types
from collections.abc import Callable
from typing import Any

import deployed_models as deployed
import pytest
import torch
import torch.nn.functional as F
from adapted_by_hand import by_hand
from deployed_cases import (
    ALL,
    ASKED,
    STEPS,
    assert_same_output,
    call,
    memory_of,
    outcome,
    policy_cases,
    reachable,
    returned,
    wrapped,
)
from engine_cases import PLAIN_POLICIES, POLICIES
from face import assert_same_values, build, fingerprint
from models import Conv4, NormedMlp, class_tasks, seeded
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from metawrap import MAMLPlusPlus


@pytest.mark.sampled(5)
@policy_cases(ALL, engines=("functional", "higher"))
def test_output_is_the_learners_own_prediction_and_that_of_plain_pytorch(name: str, norm: str, engine: str) -> None:
    case = ALL[name]
    if engine == "higher" and not case.higher:
        pytest.skip("refused: see test_surgery")
    _, learner = wrapped(name, norm, engine)
    support_x, support_y, target_x, target_y = case.task()
    for steps in ASKED:
        adapted = learner.adapt(support_x, support_y, steps=steps)
        expected = by_hand(name, norm, STEPS if steps is None else steps)
        told = learner.evaluate([(support_x, support_y, target_x, target_y)], steps=steps, keep_predictions=True)
        with torch.no_grad():
            fused = call(adapted, target_x)
        for found in (call(adapted, target_x), fused, told.predictions[0]):
            assert_same_output(found, expected)
    before = fingerprint(learner)
    learner.eval()
    told = learner([(support_x, support_y, target_x, target_y)])
    learner.train()
    assert_same_output(told.predictions[0], by_hand(name, norm, STEPS))
    assert fingerprint(learner) == before
    # What is unwrapped holds stored statistics, not those of a support set.
    plain = learner.unwrap().eval()
    assert_same_output(call(plain, target_x), by_hand(name, norm, 0, unwrapped=True))


def class_of(module: nn.Module) -> tuple[Any, ...]:
    """The class; for a parametrized module, whose class torch makes anew for each, its name and bases."""
    cls = type(module)
    return (cls.__name__, cls.__bases__) if parametrize.is_parametrized(module) else (cls,)


@pytest.mark.sampled(10)
@policy_cases(ALL)
def test_returned_module_is_of_the_users_classes_and_shares_nothing(name: str, norm: str) -> None:
    model, learner = wrapped(name, norm)
    modules = returned(name, norm)
    # Looked at when all have been made: memory that is freed in between may be taken again.
    taken = memory_of(model) | memory_of(learner)
    original = ALL[name].original()
    structure = [(path, class_of(part)) for path, part in original.named_modules(remove_duplicate=False)]
    parameters = [
        (path, type(p), p.shape, p.dtype, p.requires_grad)
        for path, p in original.named_parameters(remove_duplicate=False)
    ]
    attributes = {path: set(vars(part)) for path, part in model.named_modules()}
    for made, plain in modules.items():
        assert structure == [(path, class_of(part)) for path, part in plain.named_modules(remove_duplicate=False)]
        assert parameters == [
            (path, type(p), p.shape, p.dtype, p.requires_grad)
            for path, p in plain.named_parameters(remove_duplicate=False)
        ]
        assert all(p.grad is None and p.is_leaf and not p.is_inference() for p in plain.parameters())
        tensors = [*plain.parameters(), *plain.buffers()]
        assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in tensors)  # no row of a larger one
        assert {path: set(vars(part)) for path, part in plain.named_modules()} == attributes
        assert not [part for part in plain.modules() if part.training] or made == "unwrap"
        owners = {getattr(type(value), "__module__", None) or "" for value in reachable(plain)}
        assert not [owner for owner in owners if owner.split(".")[0] in ("metawrap", "higher")]
        functions = [value for value in reachable(plain) if isinstance(value, types.FunctionType)]
        assert not [function for function in functions if (function.__module__ or "").startswith("metawrap")]
        assert not memory_of(plain) & taken, made
        taken |= memory_of(plain)


def test_the_tests_own_search_finds_what_is_hidden() -> None:
    model = seeded(deployed.ClosuresInContainers)
    copied = copy.deepcopy(model)  # leaves the closures on the original
    assert memory_of(copied) & memory_of(model)
    learner = build(seeded(NormedMlp))
    assert "metawrap" in {type(value).__module__.split(".")[0] for value in reachable(learner.model)}


@pytest.mark.parametrize("norm", POLICIES)
def test_mode_is_that_of_the_learner_for_unwrap_and_eval_for_adapt(norm: str) -> None:
    learner = build(seeded(Conv4), norm=norm, keep_norm="conv0.norm")
    support_x, support_y, _, _ = class_tasks((1, 16, 16), shots=2)
    for mode in (True, False):
        learner.train(mode)
        plain = learner.unwrap()
        assert {part.training for path, part in plain.named_modules() if path != "conv0.norm"} == {mode}
        assert not plain.conv0.norm.training  # kept norms run on what they have stored
        assert not any(part.training for part in learner.adapt(support_x[0], support_y[0]).modules())


# --- what one does with a module -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("norm", PLAIN_POLICIES)
@pytest.mark.parametrize("name", ["Conv4", "metaclass", "transformer encoder", "kinds of norm", "LSTM"])
def test_adapted_module_can_be_cast(name: str, norm: str, dtype: torch.dtype) -> None:
    target_x = ALL[name].task()[2]
    plain = returned(name, norm)["adapt(None)"]
    cast = copy.deepcopy(plain).to(dtype)
    assert {p.dtype for p in cast.parameters()} == {dtype}
    with torch.no_grad():
        found, expected = cast(target_x.to(dtype)), plain(target_x)
    assert found.dtype == dtype
    tolerance = {torch.float32: 1e-4, torch.float16: 0.05, torch.bfloat16: 0.3}[dtype]
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.sampled(10)
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("norm", POLICIES)
def test_a_model_in_half_precision_adapts_and_evaluates_in_it(norm: str, dtype: torch.dtype, affine: bool) -> None:
    model = seeded(NormedMlp)
    model.norm = nn.BatchNorm1d(6, affine=affine).double()
    support_x, support_y, target_x, target_y = (part[0] for part in class_tasks((4,), shots=2))
    full = MAMLPlusPlus(copy.deepcopy(model), inner_steps=2, norm=norm)  # type: ignore[arg-type]
    half = MAMLPlusPlus(copy.deepcopy(model).to(dtype), inner_steps=2, norm=norm)  # type: ignore[arg-type]
    adapted = half.adapt(support_x.to(dtype), support_y)
    tensors = [*adapted.parameters(), *adapted.buffers()]
    assert {tensor.dtype for tensor in tensors if tensor.is_floating_point()} == {dtype}
    task = (support_x.to(dtype), support_y, target_x.to(dtype), target_y)
    told = half.evaluate([task], keep_predictions=True).predictions[0]
    expected = full.adapt(support_x, support_y)(target_x).detach()
    for found in (adapted(target_x.to(dtype)), told):
        assert found.dtype == dtype
        torch.testing.assert_close(found.detach().double(), expected, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("norm", PLAIN_POLICIES)
def test_fine_tuning_with_a_plain_optimizer_moves_the_module_alone(norm: str) -> None:
    case, (model, learner) = ALL["frozen backbone"], wrapped("frozen backbone", norm)
    support_x, support_y, target_x, target_y = case.task()
    before = fingerprint(model), fingerprint(learner)
    adapted = learner.adapt(support_x, support_y)
    start = {path: p.detach().clone() for path, p in adapted.named_parameters()}
    optimizer = torch.optim.SGD(adapted.parameters(), lr=0.1)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = F.cross_entropy(adapted(target_x), target_y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    moved = {path for path, p in adapted.named_parameters() if not torch.equal(p, start[path])}
    assert moved == {path for path, _ in model.named_parameters() if not path.startswith("conv0.")}
    assert (fingerprint(model), fingerprint(learner)) == before


@pytest.mark.parametrize("norm", PLAIN_POLICIES)
def test_in_training_mode_the_norms_are_torchs_own(norm: str) -> None:
    _, learner = wrapped("metaclass", norm)
    support_x, support_y, target_x, _ = ALL["metaclass"].task()
    adapted = learner.adapt(support_x, support_y)
    by_eval, before = adapted(target_x).detach(), copy.deepcopy(adapted.norm.state_dict())
    hidden = adapted.first(target_x).detach()
    normalised = (hidden - hidden.mean(0)) / torch.sqrt(hidden.var(0, correction=0) + adapted.norm.eps)
    expected = adapted.linear(torch.tanh(normalised * adapted.norm.weight + adapted.norm.bias))
    rows = copy.deepcopy(dict(learner.model.norm.named_buffers()))
    assert_same_values([adapted.train()(target_x)], [expected])
    if norm == "batch":
        assert_same_values([by_eval], [expected])
        assert set(adapted.norm.state_dict()) == {"weight", "bias"}
    else:
        mean = 0.9 * before["running_mean"] + 0.1 * hidden.mean(0)
        variance = 0.9 * before["running_var"] + 0.1 * hidden.var(0, correction=1)
        assert_same_values([adapted.norm.running_mean, adapted.norm.running_var], [mean, variance])
        assert int(adapted.norm.num_batches_tracked) == int(before["num_batches_tracked"]) + 1
    assert all(torch.equal(value, rows[path]) for path, value in learner.model.norm.named_buffers())


REMOVED: dict[str, Callable[[nn.Module], Any]] = {
    "parametrized": lambda module: parametrize.remove_parametrizations(module.first, "weight"),
    "parametrized norm": lambda module: parametrize.remove_parametrizations(module.norm, "weight"),
    "pruned": lambda module: prune.remove(module.first, "weight"),
    "legacy weight norm": lambda module: nn.utils.remove_weight_norm(module.first),
}


@pytest.mark.parametrize("norm", PLAIN_POLICIES)
@pytest.mark.parametrize("name", REMOVED)
def test_what_reparametrizes_can_be_removed_before_deployment(name: str, norm: str) -> None:
    model, learner = wrapped(name, norm)
    support_x, support_y, target_x, _ = ALL[name].task()
    before = fingerprint(model), fingerprint(learner)
    expected = by_hand(name, norm, STEPS)
    first, second = (learner.adapt(support_x, support_y) for _ in range(2))
    REMOVED[name](first)
    assert_same_values([first(target_x)], [expected])
    assert {type(part) for part in first.modules()} == {type(part) for part in NormedMlp().modules()}
    # All the others, which torch's own copies would share a class with, are what they were.
    assert (fingerprint(model), fingerprint(learner)) == before
    assert_same_values([second(target_x)], [expected])
    model(target_x)
    assert_same_values([learner.adapt(support_x, support_y)(target_x)], [expected])
    original = ALL[name].original()
    REMOVED[name](original)
    assert outcome(lambda: pickle.dumps(first)) == outcome(lambda: pickle.dumps(original))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("norm", PLAIN_POLICIES)
def test_what_is_returned_inside_inference_mode_trains_outside(norm: str, mode: Any) -> None:
    _, learner = wrapped("LSTM", norm)
    support_x, support_y, target_x, target_y = ALL["LSTM"].task()
    with mode():
        made = [learner.adapt(support_x, support_y), learner.unwrap()]
    for plain in made:
        assert not any(tensor.is_inference() for tensor in [*plain.parameters(), *plain.buffers()])
        F.cross_entropy(plain(target_x), target_y).backward()
        assert all(parameter.grad is not None for parameter in plain.parameters())


def test_recurrent_layers_hold_no_weights_but_their_own() -> None:
    for plain in returned("LSTM", "support").values():
        held = plain.lstm._flat_weights
        assert all(a is b for a, b in zip(held, plain.lstm.parameters(), strict=True))


class ClosureOverBuffer(NormedMlp):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.linspace(0.5, 1.5, 6))
        scale = self.scale
        self.between = lambda x: torch.tanh(x) * scale

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.between(self.norm(self.first(x))))


def test_closure_over_a_buffer_reads_the_copys() -> None:
    model = ClosureOverBuffer()
    learner = MAMLPlusPlus(model, inner_steps=1)
    support_x, support_y, target_x, _ = (part[0] for part in class_tasks((4,), shots=2))
    plain = learner.adapt(support_x.float(), support_y)
    assert not memory_of(plain) & (memory_of(model) | memory_of(learner))
    before = plain(target_x.float())
    with torch.no_grad():
        model.scale.zero_()
        learner.model.scale.zero_()
    assert torch.equal(plain(target_x.float()), before)
    with torch.no_grad():
        plain.scale.mul_(0)
    assert not torch.equal(plain(target_x.float()), before)


def test_adapting_again_leaves_what_was_returned_before() -> None:
    learner = build(seeded(NormedMlp), norm="support")
    batch = class_tasks((4,), shots=2)
    first = learner.adapt(batch[0][0], batch[1][0])
    before = fingerprint(first)
    learner.adapt(batch[0][1], batch[1][1])
    learner.meta_step(batch)
    assert fingerprint(first) == before
