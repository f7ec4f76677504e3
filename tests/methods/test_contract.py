"""What every method promises, whatever it does inside: one contract, every method of the command line."""

from __future__ import annotations

import copy
import inspect
import pickle
import re
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from face import assert_same_state, fingerprint, snapshot
from keywords import grouped
from models import NormedMlp, class_tasks, seeded
from torch import Tensor, nn

import metawrap
from metawrap import MetaWrapError, MetaWrapWarning, Task, methods
from metawrap.settings.keywords import keyword_types
from metawrap.training.run_settings import METHODS

NORMS = ("batch", "running", "support")
# Smaller, so that the contract is quick; and what a method needs to learn a handful of tasks by heart.
OPTIONS: dict[str, dict[str, Any]] = {
    "maml++": {"inner_steps": 2},
    "maml": {"inner_steps": 2},
    "fomaml": {"inner_steps": 2},
    "anil": {"inner_steps": 2},
    "fine-tune": {"inner_steps": 5, "classes": 9},
    "multi-task": {"inner_steps": 5, "classes": 9},
    "reptile": {"inner_steps": 4, "inner_lr": 0.5, "evaluation_steps": 4},
    "lstm": {"inner_steps": 2, "inner_lr": 0.1, "hidden_size": 5, "max_grad_norm": None},
    "mann": {"hidden": 16, "slots": 8},
    "statistician": {"hidden": 32},
}
# Chance by construction.
LEARNS_NOTHING = {"zero-step"}
# Draws random numbers in training.
DRAWS = {"statistician"}


def batch_of(tasks: int = 3, seed: int = 0, shots: int = 2) -> list[Task]:
    parts = zip(*class_tasks((4,), tasks=tasks, shots=shots, seed=seed), strict=True)
    return [Task(*each, classes=(3 * place, 3 * place + 1, 3 * place + 2)) for place, each in enumerate(parts)]


def make(name: str, model: nn.Module | None = None, **options: Any) -> Any:
    method = getattr(methods, METHODS[name])
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore", MetaWrapWarning)
        torch.manual_seed(0)
        return method(seeded(NormedMlp) if model is None else model, **grouped(**OPTIONS.get(name, {}) | options))


def gradients(learner: Any) -> dict[str, Tensor | None]:
    return {name: None if p.grad is None else p.grad.clone() for name, p in learner.named_parameters()}


def assert_close(found: dict[str, Tensor | None], expected: dict[str, Tensor | None], tolerance: float = 1e-9) -> None:
    assert found.keys() == expected.keys()
    scale = max(float(g.abs().max()) for g in expected.values() if g is not None)
    for name, gradient in expected.items():
        zero = torch.zeros(()) if gradient is None else torch.zeros_like(gradient)
        one, other = (zero if g is None else g for g in (found[name], gradient))
        assert float((one - other).abs().max()) <= tolerance * scale, name


@pytest.fixture(params=METHODS)
def name(request: pytest.FixtureRequest) -> Iterator[str]:
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", MetaWrapWarning)
        torch.manual_seed(1)
        yield request.param


def test_every_method_that_is_exported_can_be_named_on_the_command_line() -> None:
    classes = {n for n, value in vars(methods).items() if inspect.isclass(value) and issubclass(value, methods.Method)}
    abstract = {n for n in classes if inspect.isabstract(getattr(methods, n))}
    assert classes - abstract == set(METHODS.values())
    assert set(METHODS.values()) <= set(metawrap.__all__)


def test_it_names_its_source(name: str) -> None:
    text = inspect.getdoc(getattr(methods, METHODS[name])) or ""
    assert name in LEARNS_NOTHING or re.search(r"\b(19|20)\d\d\b", text), "a paper, with its year"


def test_its_keywords_are_known_and_a_wrong_one_is_refused(name: str) -> None:
    assert {"meta_lr", "norm", "loss_fn", "optimizer"} <= set(keyword_types(getattr(methods, METHODS[name])))
    for wrong in ("meta_rl", "parts"):
        with pytest.raises(TypeError, match=wrong):
            make(name, **{wrong: 0.1})


def test_the_users_module_is_never_changed(name: str) -> None:
    model, batch = seeded(NormedMlp), batch_of()
    before = fingerprint(model)
    learner = make(name, model)
    learner.meta_step(batch)
    learner.evaluate(batch)
    learner.adapt(batch[0].support_x, batch[0].support_y)
    assert fingerprint(model) == before
    mine = {id(p) for p in model.parameters()} | {id(b) for b in model.buffers()}
    assert not mine & {id(t) for t in (*learner.parameters(), *learner.buffers())}


def test_it_learns_tasks_by_heart(name: str) -> None:
    batch = batch_of()
    learner = make(name, meta_lr=0.02)
    before = copy.deepcopy(dict(learner.named_parameters()))
    first = [learner.meta_step(batch).loss for _ in range(5)]
    last = [learner.meta_step(batch).loss for _ in range(60)][-5:]
    assert sum(last) < (0.999 if name in LEARNS_NOTHING else 0.8) * sum(first)
    assert any(not torch.equal(p, before[n]) for n, p in learner.named_parameters())


def test_backward_of_forward_is_the_gradient_of_meta_step(name: str) -> None:
    batch, one = batch_of(), make(name, optimizer=lambda p: torch.optim.SGD(p, lr=0.0))
    torch.manual_seed(3)
    loss = one.meta_step(batch).loss
    other = make(name)
    torch.manual_seed(3)
    output = other(batch)
    output.loss.backward()
    assert float(output.loss.detach()) == pytest.approx(loss, rel=1e-9)
    assert_close(gradients(other), gradients(one))


def test_a_batch_is_the_mean_of_its_tasks_whatever_the_chunks(name: str) -> None:
    def gradient(tasks: list[Task], **options: Any) -> dict[str, Tensor | None]:
        learner = make(name, optimizer=lambda p: torch.optim.SGD(p, lr=0.0), **options)
        torch.manual_seed(3)
        learner.meta_step(tasks)
        return gradients(learner)

    batch = batch_of()
    whole = gradient(batch)
    assert_close(gradient(batch, tasks_per_backward=2), whole)
    if name in DRAWS:  # One task alone does not draw what it draws as the second.
        return
    each = [gradient([task]) for task in batch]
    mean = {
        n: None if all(g[n] is None for g in each) else sum(g[n] for g in each if g[n] is not None) / len(each)  # type: ignore[misc]
        for n in whole
    }
    assert_close(mean, whole)


@pytest.mark.parametrize("norm", NORMS)
def test_adapt_predicts_as_evaluate_does(name: str, norm: str) -> None:
    learner, batch = make(name, norm=norm), batch_of()
    for _ in range(3):
        learner.meta_step(batch)
    torch.manual_seed(5)
    result = learner.evaluate(batch[:1], keep_predictions=True)
    torch.manual_seed(5)
    module = learner.adapt(batch[0].support_x, batch[0].support_y)
    module = pickle.loads(pickle.dumps(module))
    assert not module.training
    assert not any(isinstance(m, methods.Method) for m in module.modules())
    with torch.no_grad():
        found = module(batch[0].target_x)
    expected = result.predictions[0]
    assert torch.equal(found.argmax(1), expected.argmax(1))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("norm", ["running", "support"])
def test_a_target_is_judged_alone_as_in_company(name: str, norm: str) -> None:
    learner, task = make(name, norm=norm), batch_of()[0]
    learner.meta_step([task])
    torch.manual_seed(5)
    together = learner.evaluate([task], keep_predictions=True).predictions[0]
    for index in range(2):
        one = slice(index, index + 1)
        torch.manual_seed(5)
        alone = Task(task.support_x, task.support_y, task.target_x[one], task.target_y[one])  # type: ignore[index]
        found = learner.evaluate([alone], keep_predictions=True).predictions[0]
        torch.testing.assert_close(found, together[one], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("training", [True, False])
def test_evaluating_changes_nothing(name: str, training: bool) -> None:
    learner, batch = make(name), batch_of()
    learner.meta_step(batch)
    learner.train(training)
    learner.evaluate(batch)  # The first look in this mode.
    before, state = fingerprint(learner), snapshot(dict(learner.state_dict()))
    with torch.inference_mode():
        learner.evaluate(batch)
        learner.adapt(batch[0].support_x, batch[0].support_y)
    for norm in NORMS:
        learner.evaluate(batch, norm=norm)
    learner.unwrap()
    str(learner.describe())
    if not training:
        learner(batch)
    assert fingerprint(learner) == before
    assert_same_state(dict(learner.state_dict()), state)
    assert learner.training is training


def test_a_fresh_learner_takes_a_trained_ones_state_before_any_task(name: str) -> None:
    learner, batch = make(name), batch_of()
    for _ in range(3):
        learner.meta_step(batch)
    fresh = make(name, seeded(NormedMlp, seed=9))
    fresh.load_state_dict(learner.state_dict())
    fresh.optimizer.load_state_dict(snapshot(learner.optimizer.state_dict()))
    for one in (learner, fresh):
        torch.manual_seed(5)
        one.last = one.evaluate(batch, keep_predictions=True).predictions
    for found, expected in zip(fresh.last, learner.last, strict=True):
        assert torch.equal(found, expected)
    del learner.last, fresh.last
    for one in (learner, fresh):
        torch.manual_seed(6)
        one.meta_step(batch)
    assert_same_state(dict(fresh.state_dict()), dict(learner.state_dict()))


def test_its_state_is_plain_tensors_before_any_task_too(name: str, tmp_path: Path) -> None:
    learner = make(name)
    torch.save(learner.state_dict(), tmp_path / "state.pt")
    fresh = make(name, seeded(NormedMlp, seed=9))
    fresh.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(fresh.model.first.weight, learner.model.first.weight)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("way", [copy.deepcopy, lambda learner: pickle.loads(pickle.dumps(learner))])
def test_a_copy_learns_as_the_learner_does_and_apart_from_it(name: str, trained: bool, way: Any) -> None:
    learner, batch = make(name), batch_of()
    if trained:
        learner.meta_step(batch)
    twin = way(learner)
    before = fingerprint(learner)
    torch.manual_seed(4)
    twin.meta_step(batch)
    assert fingerprint(learner) == before
    torch.manual_seed(4)
    learner.meta_step(batch)
    assert_same_state(dict(twin.state_dict()), dict(learner.state_dict()))


def test_unwrap_is_the_users_own_class_and_runs(name: str) -> None:
    learner, batch = make(name), batch_of()
    learner.meta_step(batch)
    plain = learner.unwrap()
    assert type(plain) is NormedMlp
    assert [n for n, _ in plain.named_parameters()] == [n for n, _ in seeded(NormedMlp).named_parameters()]
    assert plain(batch[0].target_x).shape == (6, 3)


def test_it_describes_itself_before_and_after_a_task(name: str) -> None:
    learner = make(name)
    for _ in range(2):
        description = learner.describe()
        assert METHODS[name] in str(description)
        assert "NormedMlp" in str(description)
        assert description.to_dict()["method"]
        assert description._repr_html_()
        learner.meta_step(batch_of())
    assert learner.describe().head in ("linear", None)


def test_a_frozen_parameter_stays_frozen(name: str) -> None:
    model = seeded(NormedMlp)
    model.get_parameter("first.weight").requires_grad_(False)
    learner, batch = make(name, model), batch_of()
    before = learner.model.first.weight.detach().clone()
    for _ in range(2):
        learner.meta_step(batch)
    assert torch.equal(learner.model.first.weight, before)


def test_a_step_that_is_not_finite_is_skipped_and_counted(name: str) -> None:
    learner, batch = make(name), batch_of()
    learner.meta_step(batch)
    weights = {n: p.detach().clone() for n, p in learner.named_parameters()}
    statistics = {n: b.detach().clone() for n, b in learner.model.named_buffers()}
    broken = [batch[0], batch[1].map(lambda t: torch.full_like(t, torch.inf) if t.is_floating_point() else t)]
    assert learner.meta_step(broken).skipped
    assert int(learner.skipped_steps[0]) == 1
    for n, p in learner.named_parameters():
        assert torch.equal(p, weights[n]), n
    for n, b in learner.model.named_buffers():
        assert torch.equal(b, statistics[n]), n
    assert not learner.meta_step(batch).skipped


def test_a_failed_call_leaves_it_as_it_was(name: str) -> None:
    learner, batch = make(name), batch_of()
    learner.meta_step(batch)
    before, state = fingerprint(learner), snapshot(dict(learner.state_dict()))
    task = batch[0]
    wrong = replace(task, target_y=task.target_y + 7)
    with pytest.raises(MetaWrapError, match=r"target_y"):
        learner.meta_step([batch[1], wrong])
    assert fingerprint(learner) == before
    assert_same_state(dict(learner.state_dict()), state)
