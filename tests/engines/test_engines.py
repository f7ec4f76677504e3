"""Both engines against the oracle, in float64, on every shape of network that people bring."""

from __future__ import annotations

import pytest
import torch
from engine_cases import ALL_ENGINES, CASES, ENGINES, case_learner, case_reference
from face import as_tasks, assert_equals_reference, reference_for
from models import seeded


@pytest.mark.sampled(2)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", CASES)
def test_meta_step_equals_the_oracle(name: str, engine: str) -> None:
    case = CASES[name]
    learner = case_learner(case, engine)
    metrics = learner.meta_step(case.batch())
    assert_equals_reference(learner, metrics.loss, case_reference(name))


@pytest.mark.sampled(6)
@pytest.mark.parametrize("engine", ALL_ENGINES)
@pytest.mark.parametrize("name", ["conv4", "lstm", "tied weights", "user hooks", "norm with activation"])
def test_forward_and_backward_equal_the_oracle(name: str, engine: str) -> None:
    case = CASES[name]
    learner = case_learner(case, engine)
    output = learner(case.batch())
    output.loss.backward()
    reference = case_reference(name)
    assert_equals_reference(learner, output.loss.detach(), reference)
    expected = torch.stack([torch.stack(losses) for losses in reference.step_losses])
    torch.testing.assert_close(output.step_losses, expected, rtol=1e-9, atol=0)
    for found, expected in zip(output.predictions, reference.predictions, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("engine", ALL_ENGINES)
def test_tied_weights_stay_tied_in_the_learner_and_in_what_it_returns(engine: str) -> None:
    learner = case_learner(CASES["tied weights"], engine)
    batch = CASES["tied weights"].batch()
    learner.meta_step(batch)
    support_x, support_y, *_ = as_tasks(batch)[0]
    for model in (learner.model, learner.unwrap(), learner.adapt(support_x, support_y)):
        assert model.into.weight is model.again.weight
        assert model.mix is model.mix_alias
    assert set(learner.learning_rates) == {
        "into.weight", "into.bias", "mix.weight", "mix.bias", "again.bias", "linear.weight", "linear.bias"
    }  # fmt: skip


@pytest.mark.parametrize("engine", ALL_ENGINES)
@pytest.mark.parametrize("name", ["conv4", "lstm", "tied weights", "user hooks", "norm with activation"])
def test_adapted_module_predicts_what_the_oracle_predicts(name: str, engine: str) -> None:
    case = CASES[name]
    model, learner, batch = seeded(case.make), case_learner(case, engine), case.batch()
    reference = reference_for(model, learner, batch, [0.0, 1.0], after_norm=case.after_norm, training=False)
    for index, (support_x, support_y, target_x, _) in enumerate(as_tasks(batch)):
        adapted = learner.adapt(support_x, support_y)
        assert type(adapted) is type(model)
        torch.testing.assert_close(adapted(target_x).detach(), reference.predictions[index], rtol=1e-9, atol=1e-11)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["conv4", "strided conv4", "resnet", "vision transformer", "lstm", "user hooks"])
def test_meta_step_on_cuda_equals_the_oracle_on_the_cpu(name: str, engine: str) -> None:
    case = CASES[name]
    learner = case_learner(case, engine).to("cuda")
    metrics = learner.meta_step(tuple(part.to("cuda") for part in case.batch()))
    assert_equals_reference(learner, metrics.loss, case_reference(name), tolerance=1e-8)
